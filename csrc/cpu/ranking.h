#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "freedave/rows.h"
#include "freedave/static_step.h"
#include "freedave/total_order.h"

namespace freedave::cpu {

// Positions as sortable keys; see position_key.
using Keys = std::vector<uint64_t>;

// Appends the rankable masked positions of `span`, and returns how many masked ones cannot be ranked.
template <typename IsMasked, typename Confidence>
int64_t collect(const IsMasked& is_masked, const Confidence& confidence, Span span, Order order, Keys& keys) {
  int64_t unrankable = 0;
  for (int64_t i = span.begin; i < span.end; ++i) {
    if (!is_masked(i)) continue;
    const float c = confidence(i);
    if (is_rankable(c)) {
      keys.push_back(position_key(order, c, i));
    } else {
      ++unrankable;
    }
  }
  return unrankable;
}

// Sorts so that the first `count` of [first, last) come first, in order. One pick needs no sort.
inline void sort_first(Keys::iterator first, Keys::iterator last, int64_t count) {
  if (count == 1) {
    if (first != last) std::iter_swap(first, std::min_element(first, last));
  } else if (count < last - first) {
    std::partial_sort(first, first + count, last);
  } else {
    std::sort(first, last);
  }
}

// Moves to the front the positions that pass the threshold by the rule, and returns how many. Left to right only the
// leading run of masked positions passes. `keys` holds the rankable positions of `span`, ascending by position, of
// which `unrankable` more are masked.
template <typename IsMasked, typename Confidence>
int64_t pass_threshold(const IsMasked& is_masked, const Confidence& confidence, Span span, Order order,
                       double threshold, Rule rule, int64_t unrankable, Keys& keys) {
  if (order == Order::kConfidence && ignores_rank(rule)) {
    const auto passes = [&](uint64_t key) { return is_above(rule, confidence(position_of(key)), threshold); };
    return std::partition(keys.begin(), keys.end(), passes) - keys.begin();
  }
  Passing passing{rule, threshold};
  const auto rankable = static_cast<int64_t>(keys.size());
  if (order == Order::kConfidence) {
    std::sort(keys.begin(), keys.end());
    while (passing.count < rankable && passing.passes(confidence(position_of(keys[passing.count])))) {
    }
  } else {
    // Left to right, keys ascend by position already, so the leading run is a prefix of them.
    for (int64_t i = span.begin; i < span.end; ++i) {
      if (is_masked(i) && !(is_rankable(confidence(i)) && passing.passes(confidence(i)))) break;
    }
  }
  const bool all = unrankable == 0 && passing.takes_last(rankable - passing.count);
  return all ? rankable : passing.count;
}

// A row as a contiguous array: itself where it is one, else a copy in `scratch`.
template <typename T>
const T* contiguous_row(const Matrix<const T>& matrix, int64_t row, int64_t length, std::vector<T>& scratch) {
  const T* start = matrix.data + matrix.rows.start(row);
  if (matrix.rows.step == 1) return start;
  scratch.resize(length);
  for (int64_t i = 0; i < length; ++i) scratch[i] = start[i * matrix.rows.step];
  return scratch.data();
}

// The [K, L] rows of sequence b as one contiguous array: itself where it is one, else a copy.
template <typename T>
const T* contiguous_drafts(const Matrix<const T>& matrix, int64_t b, int64_t count, int64_t length,
                           std::vector<T>& copy) {
  const int64_t first = matrix.rows.start(b * count);
  const bool rows_follow = count == 1 || matrix.rows.start(b * count + 1) - first == length;
  if (matrix.rows.step == 1 && rows_follow) return matrix.data + first;
  copy.resize(count * length);
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t i = 0; i < length; ++i) copy[k * length + i] = matrix.at(b * count + k, i);
  }
  return copy.data();
}

}  // namespace freedave::cpu
