#pragma once

// Arguments of the ops at the edge of the native code: tensors as metadata and a pointer, read, checked and described,
// whoever hands them over.
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "freedave/rows.h"

namespace freedave {

// kOther: a type that no op takes.
enum class DType { kBool, kUInt8, kInt32, kInt64, kFloat32, kBFloat16, kFloat16, kFloat64, kOther };

inline const char* name(DType dtype) {
  constexpr const char* kNames[] = {"bool",     "uint8",   "int32",   "int64",       "float32",
                                    "bfloat16", "float16", "float64", "another type"};
  return kNames[static_cast<int>(dtype)];
}

// A tensor argument, named for error messages.
struct Argument {
  const char* op;
  const char* name;
  int64_t dims = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  DType dtype = DType::kOther;
  int32_t device_type = 0, device_index = 0;
  const void* data = nullptr;

  bool is(DType wanted) const { return dtype == wanted; }

  std::string shape() const {
    std::string text = "[";
    for (int64_t d = 0; d < dims; ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
    return text + "]";
  }

  const Argument& expect(std::initializer_list<DType> dtypes) const {
    for (const DType wanted : dtypes) {
      if (is(wanted)) return *this;
    }
    std::string names;
    for (const DType wanted : dtypes) names += (names.empty() ? "" : " or ") + std::string(freedave::name(wanted));
    STD_TORCH_CHECK(false, op, ": ", name, " must be ", names, ", got ", freedave::name(dtype));
    return *this;
  }

  const Argument& expect_dims(int64_t wanted) const {
    STD_TORCH_CHECK(dims == wanted, op, ": ", name, " must have ", wanted, " dimensions, got shape ", shape());
    return *this;
  }

  // The first `count` sizes of `other`, and no more.
  const Argument& expect_shape_of(const Argument& other, int64_t count) const {
    bool same = dims == count;
    for (int64_t d = 0; same && d < count; ++d) same = sizes[d] == other.sizes[d];
    STD_TORCH_CHECK(same, op, ": ", name, " must have the first ", count, " sizes of ", other.name, " ", other.shape(),
                    ", got shape ", shape());
    STD_TORCH_CHECK(device_type == other.device_type && device_index == other.device_index, op, ": ", name,
                    " must be on the device of ", other.name);
    return *this;
  }

  const Argument& expect_shape_of(const Argument& other) const { return expect_shape_of(other, other.dims); }

  // How rows over the first `leading` dimensions lie in memory; `step` is the stride within a row.
  Rows rows(int64_t leading, int64_t step) const {
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
      STD_TORCH_CHECK(rows.dims < Rows::kMaxDims, op, ": ", name, " has more than ", Rows::kMaxDims,
                      " leading dimensions that cannot be merged, shape ", shape());
      rows.size[rows.dims] = sizes[d];
      rows.stride[rows.dims++] = strides[d];
    }
    if (rows.dims == 0) {
      rows.dims = 1;
      rows.size[0] = 1;
    }
    return rows;
  }

  // As [*, L].
  template <typename T>
  Matrix<const T> matrix() const {
    return {static_cast<const T*>(data), rows(dims - 1, strides[dims - 1])};
  }

  // As [*], one number a row.
  Counts counts() const { return {data, is(DType::kInt32), rows(dims, 0)}; }
};

template <typename T>
Matrix<const T> no_matrix() {
  return {nullptr, {}};
}

inline int64_t expect_at_least(const char* op, const char* name, int64_t value, int64_t minimum) {
  STD_TORCH_CHECK(value >= minimum, op, ": ", name, " must be at least ", minimum, ", got ", value);
  return value;
}

// The words of an enum, in its order.
template <typename Enum>
Enum choose(const char* op, const char* name, std::string_view word, std::initializer_list<const char*> choices) {
  int32_t index = 0;
  for (const char* choice : choices) {
    if (word == choice) return static_cast<Enum>(index);
    ++index;
  }
  std::string expected;
  for (const char* choice : choices) expected += (expected.empty() ? "" : ", ") + std::string(choice);
  STD_TORCH_CHECK(false, op, ": ", name, " must be one of ", expected, ", got '", word, "'");
  return Enum{};
}

}  // namespace freedave
