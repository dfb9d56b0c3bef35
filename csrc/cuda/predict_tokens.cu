// token[i] = arg max_v x[i, v] and its confidence, e.g. 1 / sum_v exp(x[i, v] - max), for the masked rows i: the scan
// of scan_logits.cu over long chunks, and the merge of merge_predictions.cu, or, where single logits of a row are
// wanted beside, one that reads them.
#include "cuda/device.cuh"
#include "cuda/merged_row.cuh"
#include "cuda/scan_logits.h"
#include "freedave/single_logits.h"

namespace freedave::cuda {
namespace {

constexpr int kMergeThreads = 256;

int64_t rows_of(const PredictTokensParams& p) { return p.input_ids.rows.count * p.length; }

// A warp a row, as merge_states.
__global__ void __launch_bounds__(kMergeThreads)
    merge_and_read(const __grid_constant__ PredictTokensParams p, const double* states, int chunks, uint32_t rows) {
  let_next_kernel_launch();
  wait_for_previous_kernel();
  const uint32_t row = blockIdx.x * (kMergeThreads / kWarp) + warp_id();
  if (row >= rows) return;
  const bool drawn = p.drawn();
  const OnlineSoftmax whole =
      merged_row(states + static_cast<int64_t>(row) * chunks * kStateFields, chunks, kStateFields, drawn);
  OnlineSoftmax all = whole;
  // Rows that are not masked are as good as broken here, and not read.
  if (p.suppress == Suppress::kForbid && __shfl_sync(kFullWarp, static_cast<int>(!is_broken(whole)), 0) != 0) {
    const OnlineSoftmax part = forbidden_part(p, row, lane_id(), kWarp);
    all = merge(whole, merge_lanes(part, p.num_suppress_tokens, false));
  }
  if (lane_id() > 0) return;
  const bool predicted = !is_broken(whole) && !is_broken(all);
  const uint32_t length = static_cast<uint32_t>(p.length);
  p.token_ids[row] = predicted ? whole.token : p.input_ids.at(row / length, row % length);
  p.confidence[row] = predicted ? confidence_of(whole, all, p.measure, drawn) : -INFINITY;
  if (p.scored_ids.data) p.log_probs[row] = predicted ? scored(p, row, all) : NAN;
}

}  // namespace

int64_t workspace_bytes(const PredictTokensParams& p) {
  return rows_of(p) * chunks_of(p.vocab, kChunk) * kStateFields * static_cast<int64_t>(sizeof(double));
}

Error launch(const PredictTokensParams& p, void* workspace, Stream stream) {
  auto* states = static_cast<double*>(workspace);
  const cudaError_t error = scan_logits(p, kChunk, states, stream);
  if (error != cudaSuccess) return error;
  const int64_t rows = rows_of(p), chunks = chunks_of(p.vocab, kChunk);
  if (rows > 0 && (p.suppress == Suppress::kForbid || p.scored_ids.data)) {
    const int64_t rows_per_block = kMergeThreads / kWarp;
    const dim3 grid(static_cast<unsigned>((rows + rows_per_block - 1) / rows_per_block));
    return launch_kernel(merge_and_read, grid, kMergeThreads, stream, p, static_cast<const double*>(states),
                         static_cast<int>(chunks), static_cast<uint32_t>(rows));
  }
  const MergePredictionsParams merge{.states = states,
                                     .state_rows = {.count = rows,
                                                    .step = kStateFields,
                                                    .row_stride = chunks * kStateFields,
                                                    .dims = 1,
                                                    .size = {rows},
                                                    .stride = {chunks * kStateFields}},
                                     .chunks = chunks,
                                     .length = p.length,
                                     .input_ids = p.input_ids,
                                     .measure = p.measure,
                                     .drawn = p.drawn(),
                                     .token_ids = p.token_ids,
                                     .confidence = p.confidence};
  return launch(merge, stream);
}

}  // namespace freedave::cuda
