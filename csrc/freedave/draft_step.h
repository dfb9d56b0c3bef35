#pragma once
#include <cstdint>

#include "freedave/rows.h"
#include "freedave/static_step.h"
#include "freedave/verify_drafts.h"

namespace freedave {

enum class Drafting : int32_t { kRecycled, kNested };

// Columns of `counters`.
enum class Counter : int32_t {
  kAccepted,
  kSteps,
  kTokensCommitted,
  kMaskedInBlock,
  kMaskedInWindow,
  kPrefixLength,
  kForwardDrafts,
  kFinished,
  kNonFinite,
  kNumDrafts,
  kEnded,
  kCount,
};

struct DraftStepParams {
  Matrix<const int64_t> drafts;     // rows are (b, k), input_drafts of them a sequence
  Matrix<const int64_t> token_ids;  // rows are (b, k)
  Matrix<const float> confidence;   // rows are (b, k)
  Counts num_drafts;                // [B]
  Counts step;                      // [B]; where not given, 0
  int64_t batch, input_drafts, draft_steps, length;
  StepRule rule;
  Drafting drafting;
  Match match;
  bool has_eos_token_id;
  int64_t eos_token_id;
  // All contiguous.
  int64_t* next_drafts;      // [B, draft_steps, L]
  int32_t* next_num_drafts;  // [B]
  int64_t* next_token_ids;   // [B, L]
  float* next_confidence;    // [B, L]
  int64_t* step_map;         // [B, L]
  int64_t* counters;         // [B, Counter::kCount]
};

}  // namespace freedave
