// The ops as torch sees them: schemas, and which kernels serve which device. With tensors.h and devices.h, the only
// file that knows torch's tensors.
#include "calls.h"
#include "devices.h"
#include "launchers.h"
#include "tensors.h"

namespace freedave {
namespace {

// Calls that come through torch's dispatcher.
template <typename Device>
struct Dispatched : Device {
  using Tensor = torch::stable::Tensor;
  using Word = freedave::Word;
  using Output = freedave::Output;
  using Released = freedave::Released;
  static Argument argument(const char* op, const char* name, const Tensor& tensor) {
    return freedave::argument(op, name, tensor);
  }
};

template <typename Device>
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("predict_tokens", TORCH_BOX(&Calls<Dispatched<Device>>::predict_tokens));
  m.impl("partial_predictions", TORCH_BOX(&Calls<Dispatched<Device>>::partial_predictions));
  m.impl("merge_predictions", TORCH_BOX(&Calls<Dispatched<Device>>::merge_predictions));
  m.impl("rank_positions", TORCH_BOX(&Calls<Dispatched<Device>>::rank_positions));
  m.impl("select_transfer", TORCH_BOX(&Calls<Dispatched<Device>>::select_transfer));
  m.impl("build_drafts", TORCH_BOX(&Calls<Dispatched<Device>>::build_drafts));
  m.impl("verify_drafts", TORCH_BOX(&Calls<Dispatched<Device>>::verify_drafts));
  m.impl("draft_step", TORCH_BOX(&Calls<Dispatched<Device>>::draft_step));
}

}  // namespace

// Tests run the CUDA kernels on CPU tensors, as a library beside this one.
#if defined(FREEDAVE_EMULATED)
STABLE_TORCH_LIBRARY(freedave_emulated, m) {
#else
STABLE_TORCH_LIBRARY(freedave, m) {
#endif
  m.def(
      "predict_tokens(Tensor logits, Tensor input_ids, int mask_token_id, Tensor? mask_index=None, "
      "str measure=\"prob\", Tensor? suppress_tokens=None, bool logits_shift=False) -> (Tensor, Tensor)");
  m.def(
      "partial_predictions(Tensor logits, Tensor input_ids, int mask_token_id, int first_token_id=0, "
      "Tensor? mask_index=None, str measure=\"prob\", Tensor? suppress_tokens=None, bool logits_shift=False) -> "
      "Tensor");
  m.def("merge_predictions(Tensor states, Tensor input_ids, str measure=\"prob\") -> (Tensor, Tensor)");
  m.def(
      "rank_positions(Tensor confidence, Tensor mask_index, str order=\"confidence\", int? block_length=None) "
      "-> Tensor");
  m.def(
      "select_transfer(Tensor confidence, Tensor mask_index, int num_transfer=1, Tensor? num_transfer_per_row=None, "
      "float? threshold=None, bool strict=False, str fallback=\"top\", str order=\"confidence\", "
      "int? block_length=None) -> Tensor");
  m.def(
      "build_drafts(Tensor input_ids, Tensor token_ids, Tensor confidence, int mask_token_id, int draft_steps, "
      "int tokens_per_step=1, float? threshold=None, str order=\"confidence\", int? block_length=None) "
      "-> (Tensor, Tensor)");
  m.def(
      "verify_drafts(Tensor drafts, Tensor targets, Tensor? num_drafts=None, str match=\"exact\", "
      "int? mask_token_id=None) -> Tensor");
  m.def(
      "draft_step(Tensor drafts, Tensor token_ids, Tensor confidence, Tensor num_drafts, int mask_token_id, "
      "int draft_steps, int tokens_per_step=1, float? threshold=None, str order=\"confidence\", "
      "int? block_length=None, str drafting=\"recycled\", str match=\"exact\", int? eos_token_id=None, "
      "Tensor? step=None, Tensor? answer_start=None) -> Tensor");
}

#if defined(FREEDAVE_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(freedave_emulated, CPU, m) { implement<Cuda>(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(freedave, CPU, m) { implement<Cpu>(m); }
#if FREEDAVE_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(freedave, CUDA, m) { implement<Cuda>(m); }
#endif
#endif

}  // namespace freedave

#if !defined(FREEDAVE_EMULATED)
extern "C" __attribute__((visibility("default"))) const freedave::Launchers* freedave_launchers() {
  static const freedave::Launchers launchers = freedave::launchers_of<freedave::Cpu>();
  return &launchers;
}
#endif

#if FREEDAVE_HAS_CUDA && !defined(FREEDAVE_EMULATED)
// Whether the kernels can find the streams of the torch that loaded this library. For checks without a GPU.
extern "C" __attribute__((visibility("default"))) bool freedave_finds_cuda_streams() {
  return freedave::current_stream() != nullptr;
}
#endif
