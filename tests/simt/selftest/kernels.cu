#include "kernels.h"

#include <cuda_runtime.h>
#include <float.h>
#include <math.h>

#include <cassert>

namespace selftest {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

__global__ void __launch_bounds__(kThreads) row_sums_kernel(const float* x, float* sums, int columns) {
  using Partial = float[kWarps];
  FREEDAVE_SHARED(Partial, partial);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  float sum = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < columns; i += kThreads) sum += x[blockIdx.x * columns + i];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(kAll, sum, offset);
  if (lane == 0) partial[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += partial[w];
    sums[blockIdx.x] = total;
  }
}

__device__ __forceinline__ Top merge(Top a, Top b) {
  const bool a_leads = a.max > b.max || (a.max == b.max && a.index < b.index);
  const Top& lead = a_leads ? a : b;
  const Top& other = a_leads ? b : a;
  return {lead.max, lead.sum + other.sum * expf(other.max - lead.max), lead.index};
}

__device__ __forceinline__ Top shuffle(Top top, int lane_mask) {
  return {__shfl_xor_sync(kAll, top.max, lane_mask), __shfl_xor_sync(kAll, top.sum, lane_mask),
          __shfl_xor_sync(kAll, top.index, lane_mask)};
}

__global__ void __launch_bounds__(kThreads) row_tops_kernel(const float* x, Top* tops, int rows, int columns) {
  using Partial = Top[kWarps];
  FREEDAVE_SHARED(Partial, partial);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  for (int row = static_cast<int>(blockIdx.x); row < rows; row += static_cast<int>(gridDim.x)) {
    Top top{-FLT_MAX, 0.0f, 0x7fffffff};
    for (int i = static_cast<int>(threadIdx.x); i < columns; i += kThreads) {
      top = merge(top, {x[row * columns + i], 1.0f, i});
    }
    for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) top = merge(top, shuffle(top, lane_mask));
    if (lane == 0) partial[warp] = top;
    __syncthreads();
    if (warp == 0) {
      // One lane a warp's partial; the others add nothing.
      top = lane < kWarps ? partial[lane] : Top{-FLT_MAX, 0.0f, 0x7fffffff};
      for (int lane_mask = 16; lane_mask > 0; lane_mask /= 2) top = merge(top, shuffle(top, lane_mask));
      if (lane == 0) tops[row] = top;
    }
    __syncthreads();  // the next row uses the same partials
  }
}

__global__ void sort_rows_kernel(const uint64_t* keys, uint64_t* sorted) {
  using Keys = uint64_t[kSortSize];
  FREEDAVE_SHARED(Keys, shared);
  const int i = static_cast<int>(threadIdx.x);
  shared[i] = keys[blockIdx.x * kSortSize + i];
  __syncthreads();
  for (int size = 2; size <= kSortSize; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      const int j = i ^ stride;
      if (i < j) {
        const uint64_t a = shared[i], b = shared[j];
        if ((a > b) == ((i & size) == 0)) {
          shared[i] = b;
          shared[j] = a;
        }
      }
      // Below 32 a warp works on numbers of its own.
      if (stride >= 32) {
        __syncthreads();
      } else {
        __syncwarp();
      }
    }
    __syncthreads();
  }
  sorted[blockIdx.x * kSortSize + i] = shared[i];
}

__global__ void histogram_kernel(const int* x, unsigned* counts, unsigned long long* largest, int n, int bins) {
  using Bins = unsigned[64];
  FREEDAVE_SHARED(Bins, block_counts);
  for (int bin = static_cast<int>(threadIdx.x); bin < bins; bin += static_cast<int>(blockDim.x)) block_counts[bin] = 0;
  __syncthreads();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) {
    atomicAdd(&block_counts[x[i]], 1u);
    const unsigned long long key = static_cast<unsigned long long>(x[i]) << 32 | static_cast<unsigned>(i);
    unsigned long long seen = 0;
    while (seen < key) {
      const unsigned long long before = atomicCAS(largest, seen, key);
      if (before == seen) break;
      seen = before;
    }
    atomicMax(largest + 1, key);
    atomicMin(largest + 2, key);
  }
  __syncthreads();
  for (int bin = static_cast<int>(threadIdx.x); bin < bins; bin += static_cast<int>(blockDim.x)) {
    atomicAdd(&counts[bin], block_counts[bin]);
  }
}

__global__ void suffix_sums_kernel(const int* x, int* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int lanes = n - (i - lane) < 32 ? n - (i - lane) : 32;
  const unsigned mask = lanes == 32 ? kAll : (1u << lanes) - 1;
  int sum = x[i];
  for (int offset = 1; offset < 8; offset *= 2) {
    // Lanes beyond the last read nothing, and a lane whose source does not exist reads itself.
    const int delta = lane % 8 + offset < 8 && lane + offset < lanes ? offset : 0;
    const int other = __shfl_sync(mask, sum, lane + delta, 8);
    if (delta > 0) sum += other;
  }
  __syncthreads();  // of those that have not exited
  out[i] = sum;
}

__global__ void votes_kernel(const int* x, unsigned* out) {
  const int lane = static_cast<int>(threadIdx.x), mine = x[lane];
  const unsigned unsigned_mine = static_cast<unsigned>(mine);
  const unsigned even = __ballot_sync(kAll, mine % 2 == 0);
  unsigned results[] = {
      even,
      static_cast<unsigned>(__any_sync(kAll, mine > 90)),
      static_cast<unsigned>(__all_sync(kAll, mine > 90)),
      static_cast<unsigned>(__reduce_add_sync(kAll, mine)),
      static_cast<unsigned>(__reduce_min_sync(kAll, mine)),
      static_cast<unsigned>(__reduce_max_sync(kAll, mine)),
      __reduce_min_sync(kAll, unsigned_mine),
      __reduce_max_sync(kAll, unsigned_mine),
      __reduce_or_sync(kAll, unsigned_mine),
      __reduce_and_sync(kAll, unsigned_mine),
      __reduce_xor_sync(kAll, unsigned_mine),
      0,
  };
  // The lanes with even numbers meet among themselves, while the others go another way.
  if (mine % 2 == 0) {
    results[11] = __reduce_add_sync(even, unsigned_mine);
  } else {
    __syncwarp(~even);
  }
  __syncwarp();
  if (lane == __ffs(static_cast<int>(even)) - 1) {
    for (int i = 0; i < 12; ++i) out[i] = results[i];
  }
}

__global__ void double_all_kernel(const float* x, float* y, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * 4;
  if (i >= n) return;
  const float4 v = *reinterpret_cast<const float4*>(x + i);
  *reinterpret_cast<float4*>(y + i) = make_float4(2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w);
}

__global__ void flat_indices_kernel(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned i = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
  out[i] = static_cast<int>(i);
}

__global__ void reverse_kernel(const int* x, int* y, int n) {
  FREEDAVE_DYNAMIC_SHARED(int, shared);
  const int i = static_cast<int>(threadIdx.x);
  shared[i] = x[i];
  __syncthreads();
  y[i] = shared[n - 1 - i];
}

__global__ void squares_kernel(int* squares) {
  cudaGridDependencySynchronize();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  squares[i] = i * i;
}

__global__ void sums_kernel(const int* squares, int* sums) {
  cudaGridDependencySynchronize();
  const int sum = __reduce_add_sync(kAll, squares[blockIdx.x * 32 + threadIdx.x]);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void expect_positive_kernel(const int* x) { assert(x[threadIdx.x] > 0); }

__global__ void greedy_kernel(int* out) {
  using Much = int[6 * 1024];
  FREEDAVE_SHARED(Much, first);
  FREEDAVE_SHARED(Much, second);
  FREEDAVE_SHARED(int, last);
  first[0] = second[0] = last = *out;
}

__global__ void nothing_kernel() { cudaGridDependencySynchronize(); }

}  // namespace

cudaError_t row_sums(const float* x, float* sums, int rows, int columns) {
  return launch(row_sums_kernel, dim3(rows), dim3(kThreads), x, sums, columns);
}
cudaError_t row_tops(const float* x, Top* tops, int rows, int columns, int blocks) {
  return launch(row_tops_kernel, dim3(blocks), dim3(kThreads), x, tops, rows, columns);
}
cudaError_t sort_rows(const uint64_t* keys, uint64_t* sorted, int rows) {
  return launch(sort_rows_kernel, dim3(rows), dim3(kSortSize), keys, sorted);
}
cudaError_t histogram(const int* x, unsigned* counts, unsigned long long* largest, int n, int bins) {
  return launch(histogram_kernel, dim3((n + 63) / 64), dim3(64), x, counts, largest, n, bins);
}
cudaError_t suffix_sums(const int* x, int* out, int n) {
  return launch(suffix_sums_kernel, dim3((n + 63) / 64), dim3(64), x, out, n);
}
cudaError_t votes(const int* x, unsigned* out) { return launch(votes_kernel, dim3(1), dim3(32), x, out); }
cudaError_t double_all(const float* x, float* y, int n) {
  return launch(double_all_kernel, dim3((n + 127) / 128), dim3(32), x, y, n);
}
cudaError_t flat_indices(int* out, dim3 grid, dim3 block) { return launch(flat_indices_kernel, grid, block, out); }
cudaError_t reverse(const int* x, int* y, int n) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(1);
  config.blockDim = dim3(n);
  config.dynamicSmemBytes = n * sizeof(int);
  return cudaLaunchKernelEx(&config, reverse_kernel, x, y, n);
}
cudaError_t squares_then_sums(int* squares, int* sums, int blocks) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(32);
  config.attrs = &attribute;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, squares_kernel, squares);
  if (error != cudaSuccess) return error;
  return cudaLaunchKernelEx(&config, sums_kernel, const_cast<const int*>(squares), sums);
}
cudaError_t expect_positive(const int* x, int n) { return launch(expect_positive_kernel, dim3(1), dim3(n), x); }
cudaError_t greedy(int* out) { return launch(greedy_kernel, dim3(1), dim3(1), out); }
cudaError_t nothing(dim3 grid, dim3 block, std::size_t dynamic_bytes, cudaLaunchAttribute* attributes, unsigned count) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_bytes;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, nothing_kernel);
}

}  // namespace selftest
