#pragma once
#include <cstdint>

#include "freedave/draft_step.h"

namespace freedave {

enum class PooledDrafting : int32_t { kPooled, kPipelined };

constexpr const char* name(PooledDrafting drafting) {
  switch (drafting) {
    case PooledDrafting::kPooled:
      return "pooled";
    case PooledDrafting::kPipelined:
      return "pipelined";
  }
  return nullptr;
}

// What a sequence's forwards have found out so far. Columns are positions modulo their number, so that a window which
// slides moves nothing.
struct DraftPool {
  int64_t* states;     // [entries, columns]; the mask where open
  int64_t* token_ids;  // [entries, columns]
  int64_t* computed;   // [entries]; the position before which the predictions are known
  int64_t* age;        // [entries]; larger is newer, 0: no entry
  int64_t* start;      // the window's, at the last call
  float* confidence;   // [entries, columns]; -inf: no prediction
};

struct PooledStepParams {
  DraftStepParams step;  // drafting and match are not looked at
  int64_t* pools;        // [pool_slots, pool_width(pool_entries, pool_columns)], contiguous
  int64_t pool_slots, pool_entries, pool_columns;
  PooledDrafting drafting;
  Counts window_start;                    // [B]; where not given, 0
  Matrix<const int64_t> computed_length;  // rows are sequences; where not given, all of the window
  Counts slots;                           // [B]; where not given, sequence b has slot b
  Matrix<const bool> forget;              // one row; where not given, false
};

// All of a sequence's pool lies side by side, two float32 in the place of an integer: one tensor to hand over.
HD int64_t pool_width(int64_t entries, int64_t columns) {
  return 2 * entries * columns + 2 * entries + 1 + (entries * columns + 1) / 2;
}

HD DraftPool pool_at(int64_t* states, int64_t entries, int64_t columns) {
  int64_t* token_ids = states + entries * columns;
  int64_t* computed = token_ids + entries * columns;
  int64_t* age = computed + entries;
  int64_t* start = age + entries;
  int64_t* confidence = start + 1;
  return {states, token_ids, computed, age, start, reinterpret_cast<float*>(confidence)};
}

HD DraftPool pool_of(const PooledStepParams& p, int64_t slot) {
  return pool_at(p.pools + slot * pool_width(p.pool_entries, p.pool_columns), p.pool_entries, p.pool_columns);
}

// Of a draft's score: what a draft before it costs, and where it ends.
inline constexpr float kScoreDecay = 0.85f;
inline constexpr float kLeastScore = 1e-6f;

// How much of a measured effect is expected at other states: with half of it, models that are less sure took fewer
// forwards than with all or none, and the embedded one hardly more than with all.
inline constexpr float kEffect = 0.5f;

// What a position that was filled as foreseen multiplies the probability of the values by. (Other measures than
// probability may be greater or negative.)
HD float probability(float confidence) { return confidence < 0.0f ? 0.0f : (confidence < 1.0f ? confidence : 1.0f); }

// How likely it is that decoding gets into a later block as foreseen, where the values that were foreseen have this
// probability.
HD float score_of_values(float values) {
  const float square = values * values;
  return square * square;
}

// The column of a window's first position. (Positions are not negative; but memory is not to depend on it.)
HD int64_t column_of(int64_t position, int64_t columns) {
  const int64_t column = position % columns;
  return column < 0 ? column + columns : column;
}

namespace cpu {
void launch(const PooledStepParams& p, ParallelFor run);
}

namespace cuda {
Error launch(const PooledStepParams& p, Stream stream);  // one kernel
}

}  // namespace freedave
