#pragma once
#include <cstdint>

#include "freedave/launch.h"
#include "freedave/rows.h"
#include "freedave/static_step.h"
#include "freedave/total_order.h"

namespace freedave {

// What happens when a threshold passes nothing, or too little.
enum class Fallback : int32_t { kTop, kTopIfFewer, kTopAlways };

constexpr const char* name(Fallback fallback) {
  switch (fallback) {
    case Fallback::kTop:
      return "top";
    case Fallback::kTopIfFewer:
      return "top_if_fewer";
    case Fallback::kTopAlways:
      return "top_always";
  }
  return nullptr;
}

struct SelectTransferParams {
  Matrix<const float> confidence;
  Matrix<const bool> mask_index;
  int64_t length;
  int64_t block_length;
  Order order;
  int64_t num_transfer;
  Counts num_transfer_per_row;  // [*]; overrides num_transfer where given
  bool has_threshold;
  double threshold;
  Counts threshold_per_row;  // [*]; overrides threshold where given
  Rule rule;
  Fallback fallback;
  bool* transfer_index;  // contiguous [*, L]

  HD double threshold_of(int64_t row) const {
    return threshold_per_row.data ? threshold_per_row.float_at(row) : threshold;
  }
};

namespace cpu {
void launch(const SelectTransferParams& p, ParallelFor run);
}

namespace cuda {
Error launch(const SelectTransferParams& p, Stream stream);  // one kernel
}

}  // namespace freedave
