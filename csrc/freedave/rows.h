#pragma once
#include <cstdint>
#include <type_traits>

#include "freedave/host_device.h"

namespace freedave {

// How the rows of a [*, L] tensor lie in memory. Leading dimensions that follow one another without a gap are merged,
// so nearly every tensor has one; a slice of a batch of drafts has two. Strides are in elements and may be 0 or
// overlap.
struct Rows {
  static constexpr int kMaxDims = 8;
  int64_t count;           // product of the leading sizes
  int64_t step;            // stride of the last dimension
  int64_t row_stride;      // from a row to the next one of the same second last dimension
  int32_t dims;            // leading dimensions after merging
  int64_t size[kMaxDims];  // outermost first
  int64_t stride[kMaxDims];

  HD int64_t start(int64_t row) const {
    if (dims == 1) return row * stride[0];
    int64_t offset = 0;
    for (int d = dims - 1; d >= 0; --d) {
      offset += row % size[d] * stride[d];
      row /= size[d];
    }
    return offset;
  }
};

// Those over the first `leading` dimensions of a tensor; `step` is the stride within a row. More than kMaxDims
// dimensions where too many are left that cannot be merged.
inline Rows rows_of(const int64_t* sizes, const int64_t* strides, int64_t leading, int64_t step) {
  Rows rows{.count = 1, .step = step, .row_stride = 0, .dims = 0, .size = {}, .stride = {}};
  if (leading > 0) rows.row_stride = strides[leading - 1];
  for (int64_t d = 0; d < leading; ++d) rows.count *= sizes[d];
  for (int64_t d = 0; d < leading && rows.count > 0; ++d) {
    if (sizes[d] == 1) continue;
    const int32_t last = rows.dims - 1;
    if (rows.dims > 0 && rows.stride[last] == sizes[d] * strides[d]) {
      rows.size[last] *= sizes[d];
      rows.stride[last] = strides[d];
      continue;
    }
    if (++rows.dims > Rows::kMaxDims) return rows;
    rows.size[last + 1] = sizes[d];
    rows.stride[last + 1] = strides[d];
  }
  if (rows.dims == 0) {
    rows.dims = 1;
    rows.size[0] = 1;
  }
  return rows;
}

// A [*, L] tensor as kernels see it.
template <typename T>
struct Matrix {
  T* data;
  Rows rows;

  HD T& at(int64_t row, int64_t position) const { return data[rows.start(row) + position * rows.step]; }
};

// Rows that follow one another in the second last dimension, such as one sequence's drafts. A leading dimension is
// never merged with half of another, so they lie at equal distances. Strides stay where the parameters are: on a GPU
// that is constant memory, which instructions read without a register.
template <typename T>
struct Slab {
  const Matrix<T>& matrix;
  T* data;

  HD Slab(const Matrix<T>& matrix, int64_t first_row)
      : matrix(matrix), data(matrix.data + matrix.rows.start(first_row)) {}

  HD T& at(int64_t row, int64_t position) const {
    return data[row * matrix.rows.row_stride + position * matrix.rows.step];
  }
};

// The element at `offset` of numbers that are int32 or int64 or, where T is double, float32 or float64.
template <typename T>
HD T number_at(const void* data, bool is_32_bit, int64_t offset) {
  using Narrow = std::conditional_t<std::is_same_v<T, double>, float, int32_t>;
  return is_32_bit ? static_cast<T>(static_cast<const Narrow*>(data)[offset]) : static_cast<const T*>(data)[offset];
}

// A number a row: int32 or int64, or float32 or float64.
struct Counts {
  const void* data;  // null when the caller gave none
  bool is_32_bit;
  Rows rows;

  HD double float_at(int64_t row) const { return number_at<double>(data, is_32_bit, rows.start(row)); }

  HD int64_t at(int64_t row) const { return read(rows.start(row)); }

  HD int64_t read(int64_t offset) const { return number_at<int64_t>(data, is_32_bit, offset); }
};

}  // namespace freedave
