// accepted[b] = the draft reached from draft 0 by hopping to the furthest later draft that equals the current one's
// target.
//
// A block of threads owns a sequence, a thread a position; a hop is one pass over the drafts and one reduction of their
// agreement bits. Bound by the latency of the hops.
#include "cuda/verification.cuh"
#include "freedave/verify_drafts.h"

namespace freedave::cuda {
namespace {

__global__ void __launch_bounds__(kMaxLength) verify_sequences(const __grid_constant__ VerifyDraftsParams p) {
  FREEDAVE_SHARED(Window::Answers, answers);
  wait_for_previous_kernel();
  const int64_t b = blockIdx.x;
  Window window(answers, static_cast<int>(p.length), p.length);
  const int i = window.position;
  const int64_t given = p.num_drafts.data ? p.num_drafts.at(b) : p.draft_steps;
  const int64_t num_drafts = given < p.draft_steps ? given : p.draft_steps;

  int accepted = 0;
  for (int next = 0; next >= 0;) {
    accepted = next;
    const int64_t target = window.inside ? p.targets.at(b * p.draft_steps + accepted, i) : 0;
    next = furthest_match(window, accepted, num_drafts, p.match, p.mask_token_id, target,
                          [&](int j) { return p.drafts.at(b * p.draft_steps + j, i); });
  }
  if (i == 0) p.accepted[b] = accepted;
}

}  // namespace

Error launch(const VerifyDraftsParams& p, Stream stream) {
  if (p.batch == 0) return cudaSuccess;
  if (p.length > kMaxLength || p.draft_steps > kMaxDrafts || p.batch > INT32_MAX) return cudaErrorInvalidValue;
  return launch_kernel(verify_sequences, dim3(static_cast<unsigned>(p.batch)), threads_for(p.length), stream, p);
}

}  // namespace freedave::cuda
