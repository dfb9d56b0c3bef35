#pragma once
#include <cstdint>

#include "freedave/host_device.h"
#include "freedave/launch.h"
#include "freedave/rows.h"
#include "freedave/static_step.h"
#include "freedave/verify_drafts.h"

namespace freedave {

enum class Drafting : int32_t { kRecycled, kNested };

constexpr const char* name(Drafting drafting) {
  switch (drafting) {
    case Drafting::kRecycled:
      return "recycled";
    case Drafting::kNested:
      return "nested";
  }
  return nullptr;
}

// The first columns of a record.
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

constexpr const char* name(Counter counter) {
  switch (counter) {
    case Counter::kAccepted:
      return "accepted";
    case Counter::kSteps:
      return "steps";
    case Counter::kTokensCommitted:
      return "tokens_committed";
    case Counter::kMaskedInBlock:
      return "masked_in_block";
    case Counter::kMaskedInWindow:
      return "masked_in_window";
    case Counter::kPrefixLength:
      return "prefix_length";
    case Counter::kForwardDrafts:
      return "forward_drafts";
    case Counter::kFinished:
      return "finished";
    case Counter::kNonFinite:
      return "non_finite";
    case Counter::kNumDrafts:
      return "num_drafts";
    case Counter::kEnded:
      return "ended";
    case Counter::kCount:
      break;
  }
  return nullptr;
}

struct DraftStepParams {
  Matrix<const int64_t> drafts;     // rows are (b, k), input_drafts of them a sequence
  Matrix<const int64_t> token_ids;  // rows are (b, k)
  Matrix<const float> confidence;   // rows are (b, k)
  Counts num_drafts;                // [B]
  Counts step;                      // [B]; where not given, 0
  Counts answer_start;              // [B]; where not given, 0
  int64_t batch, input_drafts, draft_steps, length;
  StepRules rules;
  Drafting drafting = Drafting::kRecycled;
  Match match = Match::kExact;
  int64_t* records = nullptr;  // [B, record_width(L, draft_steps)], contiguous
};

// Everything that is found out about a sequence, side by side: one tensor to make, and one to copy to the host.
struct Record {
  int64_t* counters;       // [Counter::kCount]
  int64_t* token_ids;      // [L]
  int64_t* step_map;       // [L]
  int64_t* drafts;         // [draft_steps, L]
  float* confidence;       // [L], and a 0 behind it where L is odd: two in the place of an integer
  int64_t confidence_end;  // L, or L + 1 where it is odd
};

HD int64_t record_width(int64_t length, int64_t draft_steps) {
  return static_cast<int64_t>(Counter::kCount) + (2 + draft_steps) * length + (length + 1) / 2;
}

HD Record record_of(const DraftStepParams& p, int64_t b) {
  int64_t* counters = p.records + b * record_width(p.length, p.draft_steps);
  int64_t* token_ids = counters + static_cast<int>(Counter::kCount);
  int64_t* step_map = token_ids + p.length;
  int64_t* drafts = step_map + p.length;
  return {counters,
          token_ids,
          step_map,
          drafts,
          reinterpret_cast<float*>(drafts + p.draft_steps * p.length),
          (p.length + 1) / 2 * 2};
}

namespace cpu {
void launch(const DraftStepParams& p, ParallelFor run);
}

namespace cuda {
Error launch(const DraftStepParams& p, Stream stream);  // one kernel
}

}  // namespace freedave
