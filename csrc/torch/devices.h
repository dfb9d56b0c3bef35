#pragma once

// How the kernels of each device are started, once the arguments are known to be right.
#include <cstdint>

#include "freedave/limits.h"
#include "freedave/predict_tokens.h"
#include "torch/arguments.h"
#include "torch/outputs.h"

#if FREEDAVE_HAS_CUDA
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#endif
#if FREEDAVE_EMULATED
#include "simt/control.h"
#elif FREEDAVE_HAS_CUDA
#include <dlfcn.h>
#endif

namespace freedave {

// Tests run the CUDA kernels on CPU tensors, as a library beside the one that is shipped.
inline bool runs_cuda_kernels(const Argument& like) { return FREEDAVE_EMULATED || like.device.is_cuda(); }

#if !FREEDAVE_EMULATED

inline void run_on_torch_threads(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                                 void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

#endif
#if FREEDAVE_HAS_CUDA
#if !FREEDAVE_EMULATED

// torch's aoti_torch_get_current_cuda_stream, null in a torch without CUDA. Looked up in the library that has it: one
// that is built against a CPU torch does not name libtorch_cuda.so among its needs, and torch loads that out of the
// global scope, so an undefined symbol, weak or not, would never be bound to it.
using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

inline CurrentStream current_stream() {
  static const auto found = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<CurrentStream>(torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")
                                                      : nullptr);
  }();
  return found;
}

// The device of a tensor as the current one, and its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Argument& like) : guard_(like.device.index()) {
    STD_TORCH_CHECK(current_stream() != nullptr, like.op, ": this torch has no aoti_torch_get_current_cuda_stream; ",
                    "install a CUDA build of torch 2.10 or later");
    TORCH_ERROR_CODE_CHECK(current_stream()(like.device.index(), &stream_));
  }
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

#else

struct OnDevice {
  explicit OnDevice(const Argument&) {}
  ~OnDevice() { simt_synchronize(); }  // tells ThreadSanitizer that whatever follows comes after the kernels
  cudaStream_t stream() const { return nullptr; }
};

#endif

template <typename Params>
cudaError_t launch_on_cuda(const Argument&, const Params& p, cudaStream_t stream) {
  return static_cast<cudaError_t>(cuda::launch(p, stream));
}

inline cudaError_t launch_on_cuda(const Argument& like, const PredictTokensParams& p, cudaStream_t stream) {
  // Handed back to torch's allocator as soon as the kernels are queued; it gives memory to later work of the same
  // stream only.
  const Tensor workspace = new_tensor(like, ScalarType::Byte, {cuda::workspace_bytes(p)});
  return static_cast<cudaError_t>(cuda::launch(p, workspace.mutable_data_ptr(), stream));
}

#endif

// Windows and drafts that the CUDA kernels cannot serve are refused before anything is made.
inline void expect_served(const Argument& like, int64_t length, int64_t drafts = 0, int64_t pool_states = 0) {
  if (!runs_cuda_kernels(like)) return;
  const auto expect = [&](int64_t given, int64_t most, const char* what, const char* of) {
    STD_TORCH_CHECK(given <= most, like.op, ": the CUDA kernels serve ", what, "at most ", most, of, ", got ", given,
                    "; use the backend 'reference' for this call");
  };
  expect(length, kMaxLength, "windows of ", " positions");
  expect(drafts, kMaxDrafts, "", " drafts");
  expect(pool_states, kMaxPoolStates, "pools of ", " states");
}

// Starts the op's kernels where `like` lies.
template <typename Params>
void launch([[maybe_unused]] const Argument& like, const Params& p) {
#if FREEDAVE_HAS_CUDA
  if (runs_cuda_kernels(like)) {
    const OnDevice device(like);
    const cudaError_t error = launch_on_cuda(like, p, device.stream());
    STD_TORCH_CHECK(error == cudaSuccess, like.op, ": ", cudaGetErrorString(error));
    return;
  }
#endif
#if !FREEDAVE_EMULATED
  cpu::launch(p, run_on_torch_threads);
#endif
}

}  // namespace freedave
