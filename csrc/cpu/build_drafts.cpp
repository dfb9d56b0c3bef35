// drafts[k] = input_ids with the positions of the first k + 1 steps of one ranking filled in. A thread owns a sequence.
#include "freedave/build_drafts.h"
#include "cpu/drafting.h"
#include "cpu/parallel.h"

namespace freedave::cpu {

void launch(const BuildDraftsParams& p, ParallelFor run) {
  const int64_t work = p.length * (p.draft_steps + 4);
  parallel_for(run, p.input_ids.rows.count, grain_for(work), [&](int64_t begin, int64_t end) {
    thread_local Keys keys;
    thread_local std::vector<int64_t> ends, state_copy, token_copy;
    thread_local std::vector<float> confidence_copy;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t* state = contiguous_row(p.input_ids, b, p.length, state_copy);
      const int64_t* token_ids = contiguous_row(p.token_ids, b, p.length, token_copy);
      const float* confidence = contiguous_row(p.confidence, b, p.length, confidence_copy);
      const int64_t planned =
          plan_drafts(state, token_ids, confidence, p.length, p.rules.of(b), p.draft_steps, keys, ends);
      write_drafts(state, token_ids, p.length, p.draft_steps, keys, ends, p.drafts + b * p.draft_steps * p.length);
      p.num_drafts[b] = static_cast<int32_t>(planned);
    }
  });
}

}  // namespace freedave::cpu
