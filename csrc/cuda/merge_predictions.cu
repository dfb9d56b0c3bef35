// Merges the states of each row, a warp a row. A few microseconds: bound by latency.
#include "cuda/device.cuh"
#include "cuda/merged_row.cuh"
#include "freedave/online_softmax.h"
#include "freedave/predict_tokens.h"
#include "freedave/single_logits.h"

namespace freedave::cuda {
namespace {

constexpr int kMergeThreads = 256;

template <bool kSingleLogits>
__global__ void __launch_bounds__(kMergeThreads)
    merge_states(const __grid_constant__ MergePredictionsParams p, uint32_t rows) {
  let_next_kernel_launch();
  wait_for_previous_kernel();
  const uint32_t row = blockIdx.x * (kMergeThreads / kWarp) + warp_id();
  if (row >= rows) return;
  const double* states = p.states + p.state_rows.start(row);
  const OnlineSoftmax whole = merged_row(states, static_cast<int>(p.chunks), p.state_rows.step, p.drawn);
  OnlineSoftmax all = whole;  // with what may not be chosen
  if constexpr (kSingleLogits) {
    all = merge(whole, merge_lanes(forbidden_part(p, states, lane_id(), kWarp), p.single_logits - 1, false));
  }
  if (lane_id() > 0) return;
  const bool predicted = !is_broken(whole) && !(kSingleLogits && is_broken(all));
  const uint32_t length = static_cast<uint32_t>(p.length);
  p.token_ids[row] = predicted ? whole.token : p.input_ids.at(row / length, row % length);
  p.confidence[row] = predicted ? confidence_of(whole, all, p.measure, p.drawn) : -INFINITY;
  if constexpr (kSingleLogits) {
    p.log_probs[row] = predicted ? log_prob_of(single_logit(p, states, 0), all) : NAN;
  }
}

}  // namespace

Error launch(const MergePredictionsParams& p, Stream stream) {
  const int64_t rows = p.input_ids.rows.count * p.length;
  if (rows == 0) return cudaSuccess;
  if (rows > INT32_MAX || p.chunks > INT32_MAX) return cudaErrorInvalidValue;
  const int64_t rows_per_block = kMergeThreads / kWarp;
  const dim3 grid(static_cast<unsigned>((rows + rows_per_block - 1) / rows_per_block));
  return launch_kernel(p.single_logits > 0 ? merge_states<true> : merge_states<false>, grid, kMergeThreads, stream, p,
                       static_cast<uint32_t>(rows));
}

}  // namespace freedave::cuda
