#pragma once
#include <cstdint>

#include "freedave/launch.h"
#include "freedave/rows.h"
#include "freedave/total_order.h"

namespace freedave {

struct RankPositionsParams {
  Matrix<const float> confidence;
  Matrix<const bool> mask_index;
  int64_t length;
  int64_t block_length;  // length when the caller gave none
  Order order;
  int32_t* rank;  // contiguous [*, L]
};

namespace cpu {
void launch(const RankPositionsParams& p, ParallelFor run);
}

namespace cuda {
Error launch(const RankPositionsParams& p, Stream stream);  // one kernel
}

}  // namespace freedave
