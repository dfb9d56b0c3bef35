#pragma once

// Small kernels that use everything the emulator offers, one launcher each. Pointers are to host memory.
#include <cuda_runtime_api.h>

#include <cstdint>

namespace selftest {

struct Top {
  float max, sum;  // sum of exp(x - max)
  int index;       // the lowest whose x is max
};

inline constexpr int kSortSize = 256;

// sums[row] = sum of x[row, :]
cudaError_t row_sums(const float* x, float* sums, int rows, int columns);
// tops[row] = the largest of x[row, :], where it is first, and the softmax's denominator; a block does several rows
cudaError_t row_tops(const float* x, Top* tops, int rows, int columns, int blocks);
// sorted[row] = the kSortSize keys of a row, ascending
cudaError_t sort_rows(const uint64_t* keys, uint64_t* sorted, int rows);
// counts[v] = how many x are v; largest = max of x << 32 | index, which is taken from the atomics
cudaError_t histogram(const int* x, unsigned* counts, unsigned long long* largest, int n, int bins);
// out[i] = sum of x[j], j >= i, within groups of 8 lanes; threads beyond `n` exit first
cudaError_t suffix_sums(const int* x, int* out, int n);
// out[0 .. 11] = votes and reductions of one warp over x
cudaError_t votes(const int* x, unsigned* out);
// y[i] = x[i] * 2, 16 bytes at a time
cudaError_t double_all(const float* x, float* y, int n);
// out[i] = the flat thread index, from three-dimensional blocks
cudaError_t flat_indices(int* out, dim3 grid, dim3 block);
// y = x reversed, through dynamic shared memory
cudaError_t reverse(const int* x, int* y, int n);
// squares[i] = i * i, then in a kernel that may begin early: sums[b] = sum of 32 squares
cudaError_t squares_then_sums(int* squares, int* sums, int blocks);
// asserts that x is positive
cudaError_t expect_positive(const int* x, int n);
// wants more shared memory than there is
cudaError_t greedy(int* out);
// nothing, in any shape
cudaError_t nothing(dim3 grid, dim3 block, std::size_t dynamic_bytes, cudaLaunchAttribute* attributes, unsigned count);

}  // namespace selftest
