#pragma once
#include <cstdint>

#include "freedave/launch.h"
#include "freedave/logit_types.h"
#include "freedave/online_softmax.h"
#include "freedave/rows.h"

namespace freedave {

// The logits of which rows are to be looked at: [*, L, V] with the vocabulary contiguous; everything else [*, L]. A row
// is one position.
struct LogitsToScan {
  const void* logits;
  Rows logit_rows;  // over (*, L); step is 1
  LogitType logit_type;
  int64_t length;          // L
  int64_t vocab;           // V
  int64_t first_token_id;  // of the first logit of each row
  bool logits_shift;       // position i reads row i - 1, position 0 reads row 0
  Matrix<const int64_t> input_ids;
  Matrix<const bool> mask_index;  // data is null: masked where input_ids == mask_token_id
  int64_t mask_token_id;
  const int64_t* suppress_tokens;  // in any order; ids that no logit has mean nothing
  int64_t num_suppress_tokens, suppress_tokens_step;
  Measure measure;
  Matrix<const float> temperature;       // 0: the largest logit is chosen, as everywhere where data is null
  Matrix<const int64_t> seed, position;  // of the noise; looked at where a token is drawn
  Matrix<const float> floor;             // there, less has probability 0; data is null: nothing has

  // Whether tokens may be drawn. States then hold choices, and rows whose largest logit is chosen do so, too.
  HD bool drawn() const { return temperature.data != nullptr; }
  HD bool draws_at(int64_t row, int64_t place) const { return temperature.at(row, place) > 0.0f; }
  // What logits are multiplied by.
  HD float scale_at(int64_t row, int64_t place) const {
    return draws_at(row, place) ? 1.0f / temperature.at(row, place) : 1.0f;
  }
  HD float floor_at(int64_t row, int64_t place) const { return floor.data ? floor.at(row, place) : -INFINITY; }
};

// What becomes of the suppressed tokens, which are never chosen: they leave the softmax, or stay in it.
enum class Suppress : int32_t { kExclude, kForbid };

constexpr const char* name(Suppress suppress) {
  switch (suppress) {
    case Suppress::kExclude:
      return "exclude";
    case Suppress::kForbid:
      return "forbid";
  }
  return nullptr;
}

struct PredictTokensParams : LogitsToScan {
  Suppress suppress;
  Matrix<const int64_t> scored_ids;  // data is null: none
  int64_t* token_ids;                // contiguous [*, L]
  float* confidence;                 // contiguous [*, L]
  float* log_probs;                  // of scored_ids, contiguous [*, L]
};

struct PartialPredictionsParams : LogitsToScan {
  double* states;  // contiguous [*, L, C, 6], C states of kTokensPerState logits each
};

struct MergePredictionsParams {
  const double* states;
  Rows state_rows;  // over (*, L); step is the stride of C
  int64_t chunks;   // C
  int64_t length;   // L
  Matrix<const int64_t> input_ids;
  Measure measure;
  bool drawn;
  int64_t single_logits = 0;   // of each state, after its fields: of the scored token, then of the forbidden ones
  int64_t* token_ids;          // contiguous [*, L]
  float* confidence;           // contiguous [*, L]
  float* log_probs = nullptr;  // of the scored token, contiguous [*, L], where there are single logits
};

// The vocabulary is split by its size alone, so that a row's bits depend neither on the batch nor on the threads.
inline constexpr int64_t kChunk = 16384;
// Shorter ones where the states are the result: a projection that makes logits for them can stop at each.
inline constexpr int64_t kTokensPerState = 4096;

inline int64_t chunks_of(int64_t vocab, int64_t chunk) { return (vocab + chunk - 1) / chunk; }

// An OnlineSoftmax as a tensor holds it; token ids are exact below 2^53.
inline constexpr int64_t kStateFields = 6;
inline constexpr int64_t kTokenIds = int64_t{1} << 53;

HD void store_state(const OnlineSoftmax& s, double* state) {
  state[0] = static_cast<double>(s.max);
  state[1] = static_cast<double>(s.second);
  state[2] = static_cast<double>(s.token);
  state[3] = s.ties;
  state[4] = s.rest;
  state[5] = s.weighted;
}

HD OnlineSoftmax load_state(const double* state) {
  return {static_cast<float>(state[0]),
          static_cast<float>(state[1]),
          static_cast<int64_t>(state[2]),
          state[3],
          state[4],
          state[5]};
}

namespace cpu {
void launch(const PredictTokensParams& p, ParallelFor run);
void launch(const PartialPredictionsParams& p, ParallelFor run);
void launch(const MergePredictionsParams& p, ParallelFor run);
}  // namespace cpu

namespace cuda {
Error launch(const PredictTokensParams& p, void* workspace, Stream stream);  // two kernels
int64_t workspace_bytes(const PredictTokensParams& p);                       // of device memory
Error launch(const PartialPredictionsParams& p, Stream stream);              // one kernel
Error launch(const MergePredictionsParams& p, Stream stream);                // one kernel
}  // namespace cuda

}  // namespace freedave
