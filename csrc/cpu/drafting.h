#pragma once
#include <cstdint>

#include "cpu/ranking.h"
#include "freedave/static_step.h"
#include "freedave/verify_drafts.h"

namespace freedave::cpu {

// Plans nested drafts from `state`: `keys` receives the positions in the order in which drafts fill them, `ends[k]` how
// many are filled after draft k. Returns the number of drafts, at most `draft_steps`. With 1, this is the static step.
//
// A draft never crosses a block boundary. A masked position that cannot be ranked ends the plan after its block.
inline int64_t plan_drafts(const int64_t* state, const int64_t* token_ids, const float* predicted, int64_t length,
                           const StepRule& rule, int64_t draft_steps, Keys& keys, std::vector<int64_t>& ends) {
  const auto is_masked = [&](int64_t i) { return state[i] == rule.mask_token_id; };
  const auto confidence = [&](int64_t i) { return confidence_in(token_ids[i], predicted[i], rule.mask_token_id); };
  keys.clear();
  ends.clear();
  const auto planned = [&] { return static_cast<int64_t>(ends.size()); };

  Span block = current_block(is_masked, rule.block_length, length);
  while (block.begin < block.end) {
    int64_t filled = static_cast<int64_t>(keys.size());
    const int64_t unrankable = collect(is_masked, confidence, block, rule.order, keys);
    const int64_t stop = static_cast<int64_t>(keys.size());

    // With a threshold, draft 0 fills what passes, or the first ranked; every further draft fills one.
    const int64_t per_draft = rule.has_threshold ? 1 : rule.tokens_per_step;
    if (rule.has_threshold && planned() == 0 && stop > 0) {
      filled = pass_threshold(is_masked, confidence, block, rule.order, rule.threshold, rule.rule, unrankable, keys);
      if (filled == 0) {
        filled = std::min(rule.tokens_per_step, stop);
        sort_first(keys.begin(), keys.end(), filled);
      }
      ends.push_back(filled);
    }
    if (planned() == draft_steps) break;

    // As many of this block's positions as the drafts still to come can use, in order.
    const int64_t left = stop - filled;
    const int64_t drafts_left = draft_steps - planned();
    sort_first(keys.begin() + filled, keys.end(), per_draft > left / drafts_left ? left : per_draft * drafts_left);
    while (filled < stop && planned() < draft_steps) {
      filled += std::min(per_draft, stop - filled);
      ends.push_back(filled);
    }
    if (planned() == draft_steps || unrankable > 0) break;

    int64_t next = block.end;
    while (next < length && !is_masked(next)) ++next;
    if (next == length) break;
    block = block_around(next, rule.block_length, length);
  }
  return planned();
}

// Writes the planned drafts, `draft_steps` rows of `length`; those beyond the plan repeat the last.
inline void write_drafts(const int64_t* state, const int64_t* token_ids, int64_t length, int64_t draft_steps,
                         const Keys& keys, const std::vector<int64_t>& ends, int64_t* drafts) {
  int64_t filled = 0;
  for (int64_t k = 0; k < draft_steps; ++k) {
    int64_t* draft = drafts + k * length;
    std::copy_n(k == 0 ? state : draft - length, length, draft);
    if (k >= static_cast<int64_t>(ends.size())) continue;
    for (; filled < ends[k]; ++filled) draft[position_of(keys[filled])] = token_ids[position_of(keys[filled])];
  }
}

// The draft furthest down the chain that is right, given that draft 0 is. `target_of(k)` is the state one static step
// after draft k; only the targets on the chain are asked for. `visit(k)` is called for every draft that the chain
// reaches.
template <typename DraftOf, typename TargetOf, typename Visit>
int64_t accept_chain(const DraftOf& draft_of, const TargetOf& target_of, const Visit& visit, int64_t num_drafts,
                     int64_t length, Match match, int64_t mask_token_id) {
  int64_t accepted = 0;
  visit(accepted);
  while (accepted + 1 < num_drafts) {
    const int64_t* target = target_of(accepted);
    const auto agrees = [&](int64_t k) {
      const int64_t* draft = draft_of(k);
      if (match == Match::kExact) return std::equal(draft, draft + length, target);
      for (int64_t i = 0; i < length; ++i) {
        if (draft[i] != target[i] && draft[i] != mask_token_id) return false;
      }
      return true;
    };
    int64_t furthest = num_drafts - 1;
    while (furthest > accepted && !agrees(furthest)) --furthest;
    if (furthest == accepted) break;
    accepted = furthest;
    visit(accepted);
  }
  return accepted;
}

}  // namespace freedave::cpu
