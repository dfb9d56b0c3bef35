// accepted[b] = the draft reached from draft 0 by hopping to the furthest later draft that equals the current one's
// target. A thread owns a sequence.
#include "freedave/verify_drafts.h"
#include "cpu/drafting.h"
#include "cpu/parallel.h"

namespace freedave::cpu {
namespace {

int64_t num_drafts_of(const VerifyDraftsParams& p, int64_t b) {
  return p.num_drafts.data ? std::min(p.num_drafts.at(b), p.draft_steps) : p.draft_steps;
}

}  // namespace

void launch(const VerifyDraftsParams& p, ParallelFor run) {
  parallel_for(run, p.batch, grain_for(p.length * p.draft_steps), [&](int64_t begin, int64_t end) {
    thread_local std::vector<int64_t> draft_copy, target_copy;
    for (int64_t b = begin; b < end; ++b) {
      const auto draft_of = [&](int64_t k) {
        return contiguous_row(p.drafts, b * p.draft_steps + k, p.length, draft_copy);
      };
      const auto target_of = [&](int64_t k) {
        return contiguous_row(p.targets, b * p.draft_steps + k, p.length, target_copy);
      };
      p.accepted[b] =
          accept_chain(draft_of, target_of, [](int64_t) {}, num_drafts_of(p, b), p.length, p.match, p.mask_token_id);
    }
  });
}

}  // namespace freedave::cpu
