#pragma once

// How the kernels of each device are started for given tensors. For ops.cpp alone.
#include <cstdint>

#include "cpu/launch.h"
#include "tensors.h"

#if FREEDAVE_HAS_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "cuda/launch.h"

#if defined(FREEDAVE_EMULATED)
#include "simt/control.h"
#else
#include <dlfcn.h>
#endif
#endif

namespace freedave {

inline void run_on_torch_threads(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                                 void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

struct Cpu {
  static void launch(const Argument&, const PredictTokensParams& p) { launch(p); }
  static void launch(const PredictTokensParams& p) { cpu::predict_tokens(p, run_on_torch_threads); }
  static void launch(const Argument&, const PartialPredictionsParams& p) { launch(p); }
  static void launch(const PartialPredictionsParams& p) { cpu::partial_predictions(p, run_on_torch_threads); }
  static void launch(const Argument&, const MergePredictionsParams& p) { launch(p); }
  static void launch(const MergePredictionsParams& p) { cpu::merge_predictions(p, run_on_torch_threads); }
  static void launch(const Argument&, const RankPositionsParams& p) { launch(p); }
  static void launch(const RankPositionsParams& p) { cpu::rank_positions(p, run_on_torch_threads); }
  static void launch(const Argument&, const SelectTransferParams& p) { launch(p); }
  static void launch(const SelectTransferParams& p) { cpu::select_transfer(p, run_on_torch_threads); }
  static void launch(const Argument&, const BuildDraftsParams& p) { launch(p); }
  static void launch(const BuildDraftsParams& p) { cpu::build_drafts(p, run_on_torch_threads); }
  static void launch(const Argument&, const VerifyDraftsParams& p) { launch(p); }
  static void launch(const VerifyDraftsParams& p) { cpu::verify_drafts(p, run_on_torch_threads); }
  static void launch(const Argument&, const DraftStepParams& p) { launch(p); }
  static void launch(const DraftStepParams& p) { cpu::draft_step(p, run_on_torch_threads); }
};

#if FREEDAVE_HAS_CUDA

#if !defined(FREEDAVE_EMULATED)
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
#endif

// The device of a tensor as the current one, and its current stream.
class OnDevice {
 public:
#if defined(FREEDAVE_EMULATED)
  explicit OnDevice(const Argument&) {}
#else
  explicit OnDevice(const Argument& like) : guard_(like.device_index) {
    STD_TORCH_CHECK(current_stream() != nullptr, like.op, ": this torch has no aoti_torch_get_current_cuda_stream; ",
                    "install a CUDA build of torch 2.10 or later");
    TORCH_ERROR_CODE_CHECK(current_stream()(like.device_index, &stream_));
  }
#endif
  cudaStream_t stream() const { return static_cast<cudaStream_t>(stream_); }

 private:
#if !defined(FREEDAVE_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

struct Cuda {
  static void launch(const Argument& like, const PredictTokensParams& p) {
    const OnDevice device(like);
    // Handed back to torch's allocator as soon as the kernels are queued; it gives memory to later work of the same
    // stream only.
    const Output workspace(DType::kUInt8, like, {cuda::predict_tokens_workspace(p)});
    expect_success(like.op, cuda::predict_tokens(p, workspace.data<void>(), device.stream()));
  }
  static void launch(const Argument& like, const PartialPredictionsParams& p) {
    expect_success(like.op, cuda::partial_predictions(p, OnDevice(like).stream()));
  }
  static void launch(const Argument& like, const MergePredictionsParams& p) {
    expect_success(like.op, cuda::merge_predictions(p, OnDevice(like).stream()));
  }
  static void launch(const Argument& like, const RankPositionsParams& p) {
    expect_served(like.op, p.length, 0);
    expect_success(like.op, cuda::rank_positions(p, OnDevice(like).stream()));
  }
  static void launch(const Argument& like, const SelectTransferParams& p) {
    expect_served(like.op, p.length, 0);
    expect_success(like.op, cuda::select_transfer(p, OnDevice(like).stream()));
  }
  static void launch(const Argument& like, const BuildDraftsParams& p) {
    expect_served(like.op, p.length, p.draft_steps);
    expect_success(like.op, cuda::build_drafts(p, OnDevice(like).stream()));
  }
  static void launch(const Argument& like, const VerifyDraftsParams& p) {
    expect_served(like.op, p.length, p.draft_steps);
    expect_success(like.op, cuda::verify_drafts(p, OnDevice(like).stream()));
  }
  static void launch(const Argument& like, const DraftStepParams& p) {
    expect_served(like.op, p.length, p.draft_steps > p.input_drafts ? p.draft_steps : p.input_drafts);
    expect_success(like.op, cuda::draft_step(p, OnDevice(like).stream()));
  }

 private:
  static void expect_served(const char* op, int64_t length, int64_t drafts) {
    STD_TORCH_CHECK(length <= cuda::kMaxLength, op, ": the CUDA kernels serve windows of at most ", cuda::kMaxLength,
                    " positions, got ", length, "; use the backend 'reference' for this call");
    STD_TORCH_CHECK(drafts <= cuda::kMaxDrafts, op, ": the CUDA kernels serve at most ", cuda::kMaxDrafts,
                    " drafts, got ", drafts, "; use the backend 'reference' for this call");
  }
  static void expect_success(const char* op, cudaError_t error) {
#if defined(FREEDAVE_EMULATED)
    simt_synchronize();  // tells ThreadSanitizer that whatever follows comes after the kernels
#endif
    STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
  }
};

#endif

}  // namespace freedave
