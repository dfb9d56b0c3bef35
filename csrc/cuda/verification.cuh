#pragma once

// Agreement of drafts with targets, one bit a draft.
#include "cuda/window.cuh"
#include "freedave/verify_drafts.h"

namespace freedave::cuda {

// The drafts 0 ... count - 1.
__device__ __forceinline__ uint32_t first_drafts(int64_t count) {
  return count <= 0 ? 0 : count >= 32 ? 0xffffffffu : (1u << count) - 1;
}

// The furthest of the drafts beyond `current` that equals `target` at every position, -1 when there is none.
// `token_of(j)` is this thread's position in draft j, `target` in the target.
template <typename TokenOf>
__device__ __forceinline__ int furthest_match(Window& window, int current, int64_t num_drafts, Match match,
                                              int64_t mask_token_id, int64_t target, const TokenOf& token_of) {
  uint32_t differ = 0;
  if (window.inside) {
    for (int j = current + 1; j < num_drafts; ++j) {
      const int64_t token = token_of(j);
      const bool agrees = token == target || (match == Match::kSubset && token == mask_token_id);
      differ |= static_cast<uint32_t>(!agrees) << j;
    }
  }
  const uint32_t beyond = first_drafts(num_drafts) & ~first_drafts(current + 1);
  const uint32_t agree = beyond & ~window.any_bits(differ);
  return agree == 0 ? -1 : 31 - __clz(static_cast<int>(agree));
}

}  // namespace freedave::cuda
