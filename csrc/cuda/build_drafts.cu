// drafts[k] = input_ids with the positions of the first k + 1 static steps filled in, all from one prediction.
//
// A block of threads owns a sequence, a thread a position, whose state stays in a register while the drafts are written
// one after the other. Bound by the latency of one pick (see window.cuh) a filled position.
#include "cuda/window.cuh"
#include "freedave/build_drafts.h"

namespace freedave::cuda {
namespace {

__global__ void __launch_bounds__(kMaxLength) build_sequences(const __grid_constant__ BuildDraftsParams p) {
  FREEDAVE_SHARED(Window::Answers, answers);
  wait_for_previous_kernel();
  const int64_t b = blockIdx.x;
  const StepRule rule = p.rules.of(b);
  Window window(answers, static_cast<int>(p.length), rule.block_length);
  const int i = window.position;

  int64_t state = window.inside ? p.input_ids.at(b, i) : 0;
  bool masked = window.inside && state == rule.mask_token_id;
  const int64_t token = masked ? p.token_ids.at(b, i) : 0;
  const float confidence = masked ? confidence_in(token, p.confidence.at(b, i), rule.mask_token_id) : -INFINITY;

  int built = 0;
  for (int64_t k = 0; k < p.draft_steps; ++k) {
    if (built == k) {
      const Fill fill = k == 0 ? static_step(window, rule, masked, confidence)
                               : fill_first(window, rule.order, picks_of(rule), masked, confidence);
      if (fill.mine) {
        state = token;
        masked = false;
      }
      built += fill.count > 0;
    }
    if (window.inside) p.drafts[(b * p.draft_steps + k) * p.length + i] = state;
  }
  if (i == 0) p.num_drafts[b] = built;
}

}  // namespace

Error launch(const BuildDraftsParams& p, Stream stream) {
  const int64_t batch = p.input_ids.rows.count;
  if (batch == 0) return cudaSuccess;
  if (p.length > kMaxLength || p.draft_steps > kMaxDrafts || batch > INT32_MAX) return cudaErrorInvalidValue;
  return launch_kernel(build_sequences, dim3(static_cast<unsigned>(batch)), threads_for(p.length), stream, p);
}

}  // namespace freedave::cuda
