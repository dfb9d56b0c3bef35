#pragma once
#include <cstdint>

#include "freedave/online_softmax.h"

namespace freedave::cpu {

// A row's chunks as one, merged in vocabulary order. `state_of(n)` is what is known of the n-th.
template <typename StateOf>
OnlineSoftmax merge_row(int64_t chunks, bool drawn, const StateOf& state_of) {
  OnlineSoftmax whole = state_of(0);
  for (int64_t chunk = 1; chunk < chunks; ++chunk) whole = merge(whole, state_of(chunk), drawn);
  return whole;
}

// `all` is the softmax that the chosen token of `whole` is part of. A row that is broken has the token that it was
// given, and no confidence.
inline void write_prediction(const OnlineSoftmax& whole, const OnlineSoftmax& all, Measure measure, bool drawn,
                             int64_t given, int64_t& token_id, float& confidence) {
  const bool broken = is_broken(whole) || is_broken(all);
  token_id = broken ? given : whole.token;
  confidence = broken ? -INFINITY : confidence_of(whole, all, measure, drawn);
}

}  // namespace freedave::cpu
