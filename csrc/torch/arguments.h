#pragma once

// Arguments of the ops, as torch's dispatcher hands them over: read, checked, and turned into what kernels take. The
// Python wrappers explain a wrong argument at length; the checks here make a raw call memory-safe.
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "freedave/names.h"
#include "freedave/rows.h"

namespace freedave {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalInt = std::optional<int64_t>;
using OptionalFloat = std::optional<double>;

// A string argument, short enough to be one of the words that the ops know.
struct Text {
  char text[24];
  operator std::string_view() const { return text; }
};

}  // namespace freedave

// torch's own conversion to std::string leaks the string (torch 2.13), once a call.
template <>
struct torch::stable::detail::ToImpl<freedave::Text> {
  static freedave::Text call(StableIValue value, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    const char* data = nullptr;
    freedave::Text text{};
    if (torch_string_c_str(handle, &data) == 0) std::string_view(data).copy(text.text, sizeof(text.text) - 1);
    torch_delete_string(handle);
    return text;
  }
};

namespace freedave {

// As Python calls it.
inline const char* name(ScalarType type) {
  constexpr std::pair<ScalarType, const char*> kNames[] = {
      {ScalarType::Bool, "bool"},         {ScalarType::Int, "int32"},     {ScalarType::Long, "int64"},
      {ScalarType::Half, "float16"},      {ScalarType::Float, "float32"}, {ScalarType::Double, "float64"},
      {ScalarType::BFloat16, "bfloat16"},
  };
  for (const auto& [known, name] : kNames) {
    if (known == type) return name;
  }
  return torch::headeronly::toString(type);
}

// A tensor argument, named for error messages. Sizes, strides and values are the tensor's own.
struct Argument {
  const char* op;
  const char* name;
  ScalarType type;
  torch::stable::Device device;
  int64_t dims;
  const int64_t* sizes;
  const int64_t* strides;
  const void* data;

  Argument(const char* op, const char* name, const Tensor& tensor)
      : op(op),
        name(name),
        type(tensor.scalar_type()),
        device(tensor.device()),
        dims(tensor.dim()),
        sizes(tensor.sizes().data()),
        strides(tensor.strides().data()),
        data(tensor.const_data_ptr()) {}

  std::string shape() const {
    std::string text = "[";
    for (int64_t d = 0; d < dims; ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
    return text + "]";
  }

  const Argument& expect(std::initializer_list<ScalarType> types) const {
    std::string expected;
    for (const ScalarType wanted : types) {
      if (type == wanted) return *this;
      expected += (expected.empty() ? "" : " or ") + std::string(freedave::name(wanted));
    }
    STD_TORCH_CHECK(false, op, ": ", name, " must be ", expected, ", got ", freedave::name(type));
    return *this;
  }

  const Argument& expect_dims(int64_t wanted) const {
    STD_TORCH_CHECK(dims == wanted, op, ": ", name, " must have ", wanted, " dimensions, got shape ", shape());
    return *this;
  }

  const Argument& expect_device_of(const Argument& other) const {
    STD_TORCH_CHECK(device == other.device, op, ": ", name, " must be on the device of ", other.name);
    return *this;
  }

  // The first `count` sizes of `other`, and no more.
  const Argument& expect_shape_of(const Argument& other, int64_t count) const {
    bool same = dims == count;
    for (int64_t d = 0; same && d < count; ++d) same = sizes[d] == other.sizes[d];
    STD_TORCH_CHECK(same, op, ": ", name, " must have the first ", count, " sizes of ", other.name, " ", other.shape(),
                    ", got shape ", shape());
    return expect_device_of(other);
  }

  const Argument& expect_shape_of(const Argument& other) const { return expect_shape_of(other, other.dims); }

  // How rows over the first `leading` dimensions lie in memory; `step` is the stride within a row.
  Rows rows(int64_t leading, int64_t step) const {
    const Rows rows = rows_of(sizes, strides, leading, step);
    STD_TORCH_CHECK(rows.dims <= Rows::kMaxDims, op, ": ", name, " has more than ", Rows::kMaxDims,
                    " leading dimensions that cannot be merged, shape ", shape());
    return rows;
  }

  // As [*, L].
  template <typename T>
  Matrix<const T> matrix() const {
    return {static_cast<const T*>(data), rows(dims - 1, strides[dims - 1])};
  }

  // L of [*, L]. Positions are sorted as 32-bit numbers.
  int64_t length() const {
    STD_TORCH_CHECK(dims >= 1, op, ": ", name, " must have at least 1 dimension");
    STD_TORCH_CHECK(sizes[dims - 1] <= INT32_MAX, op, ": ", name, " must have fewer than 2^31 positions, got shape ",
                    shape());
    return sizes[dims - 1];
  }
};

// Of 32 bits, then of 64.
constexpr auto kIntegers = {ScalarType::Int, ScalarType::Long}, kFloats = {ScalarType::Float, ScalarType::Double};
// A number of one of these types for each row over the first `count` dimensions of `other`, where the caller gave them.
inline Counts counts(const char* op, const char* name, const OptionalTensor& tensor, const Argument& other,
                     int64_t count, std::initializer_list<ScalarType> types = kIntegers) {
  if (!tensor) return {};
  const Argument argument(op, name, *tensor);
  argument.expect(types).expect_shape_of(other, count);
  return {argument.data, argument.type == *types.begin(), argument.rows(count, 0)};
}

// As [*, L], where the caller gave it: int64, float32 or bool, over the first `count` dimensions of `other` (-1: all).
template <typename T>
Matrix<const T> matrix_of(const Argument& other, const char* name, const OptionalTensor& tensor, int64_t count = -1) {
  if (!tensor) return {};
  Argument argument(other.op, name, *tensor);
  // A tensor without elements may have no memory; nothing is read then, whatever the pointer says.
  if (argument.data == nullptr) argument.data = &argument;
  argument.expect({sizeof(T) == 1 ? ScalarType::Bool : sizeof(T) == 4 ? ScalarType::Float : ScalarType::Long});
  return argument.expect_shape_of(other, count < 0 ? other.dims : count).template matrix<T>();
}

inline int64_t expect_at_least(const char* op, const char* name, int64_t value, int64_t minimum) {
  STD_TORCH_CHECK(value >= minimum, op, ": ", name, " must be at least ", minimum, ", got ", value);
  return value;
}

// The value of an enum that `word` names.
template <typename Enum>
Enum choose(const char* op, const char* argument, std::string_view word) {
  std::string expected;
  for (int32_t index = 0; index < count_of<Enum>(); ++index) {
    const auto value = static_cast<Enum>(index);
    if (word == name(value)) return value;
    expected += (index ? ", " : "") + std::string(name(value));
  }
  STD_TORCH_CHECK(false, op, ": ", argument, " must be one of ", expected, ", got '", word, "'");
  return Enum{};
}

}  // namespace freedave
