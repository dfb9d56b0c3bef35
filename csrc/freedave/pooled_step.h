#pragma once
#include <cstdint>

#include "freedave/draft_step.h"
#include "freedave/log_odds.h"

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

// What a sequence's forwards have found out so far, in a slot of its own. Columns are positions modulo their number, so
// that a window which slides moves nothing.
struct DraftPool {
  int64_t* states;     // [slots, entries, columns]; the mask where open
  int64_t* token_ids;  // [slots, entries, columns]
  float* confidence;   // [slots, entries, columns]; -inf: no prediction
  int64_t* computed;   // [slots, entries]; the position before which the predictions are known
  int64_t* age;        // [slots, entries]; larger is newer, 0: no entry
  int64_t* start;      // [slots]; the window's, at the last call
  float* effects;      // [slots, columns, columns]
  int64_t slots, entries, columns;
};

struct PooledStepParams {
  DraftStepParams step;  // drafting and match are not looked at
  DraftPool pool;
  PooledDrafting drafting;
  Counts window_start;                    // [B]; where not given, 0
  Matrix<const int64_t> computed_length;  // rows are sequences; where not given, all of the window
  Counts slots;                           // [B]; where not given, sequence b has slot b
  Matrix<const bool> forget;              // one row; where not given, false
};

// Of a draft's score: what a draft before it costs, and where it ends.
inline constexpr float kScoreDecay = 0.85f;
inline constexpr float kLeastScore = 1e-6f;

// How many positions a draft may add to the state that it is compared with.
inline constexpr int64_t kFurthestParent = 4;

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

}  // namespace freedave
