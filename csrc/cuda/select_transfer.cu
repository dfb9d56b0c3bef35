// transfer[i] = whether position i is unmasked now, by the rule of some decoder: the first ranked, those above a
// threshold, or both.
//
// A block of threads owns a row, a thread a position; a thread ranks its position by counting the keys of the current
// block before its own. A row is a few kilobytes: latency-bound.
#include "cuda/window.cuh"
#include "freedave/select_transfer.h"

namespace freedave::cuda {
namespace {

__global__ void __launch_bounds__(kMaxLength) select_rows(const __grid_constant__ SelectTransferParams p) {
  FREEDAVE_SHARED(Window::Answers, answers);
  FREEDAVE_SHARED(RowKeys, keys);
  wait_for_previous_kernel();
  const int64_t row = blockIdx.x;
  Window window(answers, static_cast<int>(p.length), p.block_length);
  const int i = window.position;
  const bool masked = window.inside && p.mask_index.at(row, i);
  const float confidence = masked ? p.confidence.at(row, i) : -INFINITY;

  const uint32_t current = window.current_block(masked);
  const bool ranked = masked && window.block == current && is_rankable(confidence);
  keys[i] = ranked ? position_key(p.order, confidence, i) : kNoKey;
  const int64_t wanted = p.num_transfer_per_row.data ? p.num_transfer_per_row.at(row) : p.num_transfer;
  const int64_t rankable = window.sum(ranked);
  __syncthreads();

  bool mine = false;
  bool take_top = true;
  if (p.has_threshold) {
    const double threshold = p.threshold_of(row);
    const bool passes = passes_threshold(window, p.order, threshold, p.rule, masked, confidence, current);
    const int64_t passing = window.sum(passes);
    const int64_t clamped = wanted < 0 ? 0 : wanted < rankable ? wanted : rankable;
    const int64_t enough = p.fallback == Fallback::kTop ? 1 : clamped;
    const bool take_passing = passing >= enough || p.fallback == Fallback::kTopAlways;
    mine = take_passing && passes;
    take_top = !take_passing || p.fallback == Fallback::kTopAlways;
  }
  if (!window.inside) return;
  if (take_top && ranked) {
    mine |= rank_in_block(keys, block_around(i, window.block_length, window.length), keys[i]) < wanted;
  }
  p.transfer_index[row * p.length + i] = mine;
}

}  // namespace

Error launch(const SelectTransferParams& p, Stream stream) {
  const int64_t rows = p.confidence.rows.count;
  if (rows == 0 || p.length == 0) return cudaSuccess;
  if (p.length > kMaxLength || rows > INT32_MAX) return cudaErrorInvalidValue;
  return launch_kernel(select_rows, dim3(static_cast<unsigned>(rows)), threads_for(p.length), stream, p);
}

}  // namespace freedave::cuda
