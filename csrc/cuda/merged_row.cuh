#pragma once

// The states of a row as one, by a warp: merged in a fixed order, so that a row's bits depend neither on who made its
// states nor on how many rows there are.
#include "cuda/device.cuh"
#include "freedave/online_softmax.h"
#include "freedave/predict_tokens.h"

namespace freedave::cuda {

__device__ __forceinline__ OnlineSoftmax shuffle_down(const OnlineSoftmax& s, int offset) {
  return {__shfl_down_sync(kFullWarp, s.max, offset),   __shfl_down_sync(kFullWarp, s.second, offset),
          __shfl_down_sync(kFullWarp, s.token, offset), __shfl_down_sync(kFullWarp, s.ties, offset),
          __shfl_down_sync(kFullWarp, s.rest, offset),  __shfl_down_sync(kFullWarp, s.weighted, offset)};
}

// The first lane has the parts of all, of which only the first `parts` lanes hold more than the neutral state: skipping
// the others changes no bit.
__device__ __forceinline__ OnlineSoftmax merge_lanes(OnlineSoftmax part, int64_t parts, bool drawn) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    if (offset < parts) part = merge(part, shuffle_down(part, offset), drawn);
  }
  return part;
}

// The first lane has the result.
__device__ __forceinline__ OnlineSoftmax merged_row(const double* states, int chunks, int64_t step, bool drawn) {
  OnlineSoftmax part = empty_softmax();
  for (int chunk = lane_id(); chunk < chunks; chunk += kWarp) {
    part = merge(part, load_state(states + chunk * step), drawn);
  }
  return merge_lanes(part, chunks, drawn);
}

}  // namespace freedave::cuda
