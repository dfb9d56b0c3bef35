#pragma once
#include <cstdint>

#include "freedave/logit_types.h"
#include "freedave/online_softmax.h"
#include "freedave/rows.h"

namespace freedave {

// logits [*, L, V] with the vocabulary contiguous; everything else [*, L]. A row is one position.
struct PredictTokensParams {
  const void* logits;
  Rows logit_rows;  // over (*, L); step is 1
  LogitType logit_type;
  int64_t length;     // L
  int64_t vocab;      // V
  bool logits_shift;  // position i reads row i - 1, position 0 reads row 0
  Matrix<const int64_t> input_ids;
  Matrix<const bool> mask_index;  // data is null: masked where input_ids == mask_token_id
  int64_t mask_token_id;
  const int64_t* suppress_tokens;  // in any order; ids outside the vocabulary mean nothing
  int64_t num_suppress_tokens, suppress_tokens_step;
  Measure measure;
  int64_t* token_ids;  // contiguous [*, L]
  float* confidence;   // contiguous [*, L]
};

// The vocabulary is split by its size alone, so that a row's bits depend neither on the batch nor on the threads.
inline constexpr int64_t kChunk = 16384;

}  // namespace freedave
