#pragma once
#include <cstdint>

#include "freedave/launch.h"
#include "freedave/rows.h"

namespace freedave {

enum class Match : int32_t { kExact, kSubset };

constexpr const char* name(Match match) {
  switch (match) {
    case Match::kExact:
      return "exact";
    case Match::kSubset:
      return "subset";
  }
  return nullptr;
}

struct VerifyDraftsParams {
  Matrix<const int64_t> drafts;   // rows are (b, k)
  Matrix<const int64_t> targets;  // rows are (b, k)
  int64_t batch, draft_steps, length;
  Counts num_drafts;  // [B]; where not given, all are active
  Match match;
  int64_t mask_token_id;
  int64_t* accepted;  // [B]
};

namespace cpu {
void launch(const VerifyDraftsParams& p, ParallelFor run);
}

namespace cuda {
Error launch(const VerifyDraftsParams& p, Stream stream);  // one kernel
}

}  // namespace freedave
