#pragma once

// Tensors at the edge of the native code: arguments read and checked, outputs made. For ops.cpp alone; LibTorch stable
// ABI throughout, so that one binary loads in later versions of torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "freedave/rows.h"

namespace freedave {

// A string argument, short enough to be one of the words that the ops know.
struct Word {
  char text[24];
  std::string_view view() const { return text; }
};

}  // namespace freedave

// torch's own conversion to std::string leaks the string (torch 2.13), once a call.
template <>
struct torch::stable::detail::ToImpl<freedave::Word> {
  static freedave::Word call(StableIValue value, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    const char* data = nullptr;
    freedave::Word word{};
    if (torch_string_c_str(handle, &data) == 0) std::string_view(data).copy(word.text, sizeof(word.text) - 1);
    torch_delete_string(handle);
    return word;
  }
};

namespace freedave {

using torch::stable::Tensor;

enum class DType { kBool, kUInt8, kInt32, kInt64, kFloat32, kBFloat16, kFloat16 };

inline int32_t code(DType dtype) {
  switch (dtype) {
    case DType::kBool:
      return aoti_torch_dtype_bool();
    case DType::kUInt8:
      return aoti_torch_dtype_uint8();
    case DType::kInt32:
      return aoti_torch_dtype_int32();
    case DType::kInt64:
      return aoti_torch_dtype_int64();
    case DType::kFloat32:
      return aoti_torch_dtype_float32();
    case DType::kBFloat16:
      return aoti_torch_dtype_bfloat16();
    case DType::kFloat16:
      return aoti_torch_dtype_float16();
  }
  return -1;
}

inline const char* name(DType dtype) {
  constexpr const char* kNames[] = {"bool", "uint8", "int32", "int64", "float32", "bfloat16", "float16"};
  return kNames[static_cast<int>(dtype)];
}

// A tensor argument, named for error messages.
struct Argument {
  const char* op;
  const char* name;
  int64_t dims;
  const int64_t* sizes;
  const int64_t* strides;
  int32_t dtype;
  int32_t device_type, device_index;
  const void* data;

  Argument(const char* op, const char* name, const Tensor& tensor) : op(op), name(name) {
    int64_t *size = nullptr, *stride = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor.get(), &dims));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &size));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &stride));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device_type));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device_index));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor.get(), &data));
    sizes = size;
    strides = stride;
  }

  bool is(DType wanted) const { return dtype == code(wanted); }

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
    STD_TORCH_CHECK(false, op, ": ", name, " must be ", names, ", got dtype code ", dtype);
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
Enum choose(const char* op, const char* name, const Word& word, std::initializer_list<const char*> choices) {
  int32_t index = 0;
  for (const char* choice : choices) {
    if (word.view() == choice) return static_cast<Enum>(index);
    ++index;
  }
  std::string expected;
  for (const char* choice : choices) expected += (expected.empty() ? "" : ", ") + std::string(choice);
  STD_TORCH_CHECK(false, op, ": ", name, " must be one of ", expected, ", got '", word.text, "'");
  return Enum{};
}

// Ownership of a tensor on its way to torch: a handle is what a stable tensor is boxed as, without a copy of it.
struct Released {
  AtenTensorHandle handle;
};

// A new contiguous tensor.
class Output {
 public:
  Output(DType dtype, const Argument& like, const int64_t* sizes, int64_t dims) {
    constexpr int64_t kInline = 8;
    int64_t inline_strides[kInline];
    std::unique_ptr<int64_t[]> more(dims > kInline ? new int64_t[dims] : nullptr);
    int64_t* strides = more ? more.get() : inline_strides;
    int64_t stride = 1;
    for (int64_t d = dims - 1; d >= 0; --d) {
      strides[d] = stride;
      stride *= sizes[d] > 0 ? sizes[d] : 1;
    }
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dims, sizes, strides, code(dtype), like.device_type, like.device_index, &handle_));
#if defined(FREEDAVE_EMULATED)
    poison(sizes, dims, dtype);
#endif
  }
  Output(DType dtype, const Argument& like, std::initializer_list<int64_t> sizes)
      : Output(dtype, like, sizes.begin(), static_cast<int64_t>(sizes.size())) {}
  Output(DType dtype, const Argument& like) : Output(dtype, like, like.sizes, like.dims) {}
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;
  ~Output() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  template <typename T>
  T* data() const {
    void* pointer = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_, &pointer));
    return static_cast<T*>(pointer);
  }

  Released release() { return {std::exchange(handle_, nullptr)}; }

 private:
#if defined(FREEDAVE_EMULATED)
  // What a kernel does not write must show in tests.
  void poison(const int64_t* sizes, int64_t dims, DType dtype) {
    constexpr size_t kBytes[] = {1, 1, 4, 8, 4, 2, 2};
    size_t bytes = kBytes[static_cast<int>(dtype)];
    for (int64_t d = 0; d < dims; ++d) bytes *= static_cast<size_t>(sizes[d]);
    if (bytes > 0) memset(data<void>(), 0xa5, bytes);
  }
#endif

  AtenTensorHandle handle_ = nullptr;
};

}  // namespace freedave
