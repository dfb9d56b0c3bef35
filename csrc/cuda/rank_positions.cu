// rank[i] = number of masked positions that are committed before i: those of lower blocks, and those of its own block
// with a smaller key.
//
// A block of threads owns a row, a thread a position. Every thread counts the keys before its own: L reads of shared
// memory, all threads the same word, are cheaper than the barriers of a sort. A row is a few kilobytes: latency-bound.
#include "cuda/window.cuh"
#include "freedave/rank_positions.h"

namespace freedave::cuda {
namespace {

__global__ void __launch_bounds__(kMaxLength) rank_rows(const __grid_constant__ RankPositionsParams p) {
  FREEDAVE_SHARED(RowKeys, keys);
  wait_for_previous_kernel();
  const int64_t row = blockIdx.x;
  const int length = static_cast<int>(p.length);
  const int i = static_cast<int>(threadIdx.x);
  const bool inside = i < length;

  const bool ranked = inside && p.mask_index.at(row, i) && is_rankable(p.confidence.at(row, i));
  keys[i] = ranked ? position_key(p.order, p.confidence.at(row, i), i) : kNoKey;
  __syncthreads();
  if (!inside) return;

  int rank = length;
  if (ranked) {
    const Span block = block_around(i, p.block_length, length);
    rank = 0;
    for (int64_t j = 0; j < block.begin; ++j) rank += keys[j] != kNoKey;
    rank += rank_in_block(keys, block, keys[i]);
  }
  p.rank[row * length + i] = rank;
}

}  // namespace

Error launch(const RankPositionsParams& p, Stream stream) {
  const int64_t rows = p.confidence.rows.count;
  if (rows == 0 || p.length == 0) return cudaSuccess;
  if (p.length > kMaxLength || rows > INT32_MAX) return cudaErrorInvalidValue;
  return launch_kernel(rank_rows, dim3(static_cast<unsigned>(rows)), threads_for(p.length), stream, p);
}

}  // namespace freedave::cuda
