#pragma once
#include <cstdint>

#include "freedave/launch.h"
#include "freedave/rows.h"
#include "freedave/static_step.h"

namespace freedave {

struct BuildDraftsParams {
  Matrix<const int64_t> input_ids;
  Matrix<const int64_t> token_ids;
  Matrix<const float> confidence;
  int64_t length;
  int64_t draft_steps;
  StepRules rules;
  int64_t* drafts;      // contiguous [B, K, L]
  int32_t* num_drafts;  // [B]
};

namespace cpu {
void launch(const BuildDraftsParams& p, ParallelFor run);
}

namespace cuda {
Error launch(const BuildDraftsParams& p, Stream stream);  // one kernel
}

}  // namespace freedave
