#pragma once
#include <cstdint>

#include "freedave/host_device.h"
#include "freedave/rows.h"
#include "freedave/static_step.h"
#include "freedave/verify_drafts.h"

namespace freedave {

enum class Drafting : int32_t { kRecycled, kNested };

// The first columns of `record`.
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
  int64_t* next_drafts;    // [B, draft_steps, L]
  float* next_confidence;  // [B, L]
  int64_t* record;         // [B, record_width(L)]
};

// A row of `record` is everything else about a sequence, side by side: one tensor to make, and one to copy to the host.
struct Record {
  int64_t* counters;        // [Counter::kCount]
  int64_t* next_token_ids;  // [L]
  int64_t* step_map;        // [L]
};

HD int64_t record_width(int64_t length) { return static_cast<int64_t>(Counter::kCount) + 2 * length; }

HD Record record_of(const DraftStepParams& p, int64_t b) {
  int64_t* counters = p.record + b * record_width(p.length);
  int64_t* next_token_ids = counters + static_cast<int>(Counter::kCount);
  return {counters, next_token_ids, next_token_ids + p.length};
}

}  // namespace freedave
