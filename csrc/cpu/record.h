#pragma once
#include <algorithm>
#include <cstdint>

#include "freedave/draft_step.h"

namespace freedave::cpu {

// Leading active drafts that still have a masked position, so need the next forward.
inline int64_t count_forward_drafts(const DraftStepParams& p, const int64_t* drafts, int64_t num_drafts) {
  int64_t count = 0;
  while (count < num_drafts) {
    const int64_t* draft = drafts + count * p.length;
    if (std::find(draft, draft + p.length, p.rules.mask_token_id) == draft + p.length) break;
    ++count;
  }
  return count;
}

// What the committed state says: what is left of the window, and whether a complete block of its prefix ends the
// sequence. Positions before `answer_start` belong to the prompt.
inline void count_committed(const DraftStepParams& p, const StepRule& rule, const int64_t* committed,
                            int64_t answer_start, int64_t* counters) {
  const auto is_masked = [&](int64_t i) { return committed[i] == p.rules.mask_token_id; };
  const Span block = current_block(is_masked, p.rules.block_length, p.length);
  int64_t in_block = 0, in_window = 0;
  for (int64_t i = block.begin; i < p.length; ++i) {
    in_window += is_masked(i);
    in_block += is_masked(i) && i < block.end;
  }
  const int64_t from = std::clamp<int64_t>(answer_start, 0, block.begin);
  const bool ended =
      std::any_of(committed + from, committed + block.begin, [&](int64_t token) { return rule.ends(token); });
  counters[static_cast<int>(Counter::kMaskedInBlock)] = in_block;
  counters[static_cast<int>(Counter::kMaskedInWindow)] = in_window;
  counters[static_cast<int>(Counter::kFinished)] = ended || in_window == 0;
  counters[static_cast<int>(Counter::kEnded)] = ended;
}

}  // namespace freedave::cpu
