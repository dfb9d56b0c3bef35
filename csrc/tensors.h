#pragma once

// Tensors and strings as torch's dispatcher hands them over, and outputs as it takes them. For ops.cpp alone; LibTorch
// stable ABI throughout, so that one binary loads in later versions of torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string_view>
#include <utility>

#include "arguments.h"

namespace freedave {

// A string argument, short enough to be one of the words that the ops know.
struct Word {
  char text[24];
  operator std::string_view() const { return text; }
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
    case DType::kFloat64:
      return aoti_torch_dtype_float64();
    case DType::kOther:
      break;
  }
  return -1;
}

inline Argument argument(const char* op, const char* name, const Tensor& tensor) {
  Argument argument{.op = op, .name = name};
  int64_t *size = nullptr, *stride = nullptr;
  int32_t dtype = -1;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor.get(), &argument.dims));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &size));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &stride));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &argument.device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &argument.device_index));
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor.get(), &argument.data));
  argument.sizes = size;
  argument.strides = stride;
  for (const DType known : {DType::kInt64, DType::kFloat32, DType::kBool, DType::kInt32, DType::kBFloat16,
                            DType::kFloat16, DType::kFloat64, DType::kUInt8}) {
    if (dtype == code(known)) argument.dtype = known;
  }
  return argument;
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
      STD_TORCH_CHECK(!__builtin_mul_overflow(stride, sizes[d] > 0 ? sizes[d] : 1, &stride), like.op,
                      ": an output has more than 2^63 elements");
    }
    TORCH_ERROR_CODE_CHECK(
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
    TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_, &pointer));
    return static_cast<T*>(pointer);
  }

  Released release() { return {std::exchange(handle_, nullptr)}; }

 private:
#if defined(FREEDAVE_EMULATED)
  // What a kernel does not write must show in tests.
  void poison(const int64_t* sizes, int64_t dims, DType dtype) {
    constexpr size_t kBytes[] = {1, 1, 4, 8, 4, 2, 2, 8};
    size_t bytes = kBytes[static_cast<int>(dtype)];
    for (int64_t d = 0; d < dims; ++d) bytes *= static_cast<size_t>(sizes[d]);
    if (bytes > 0) memset(data<void>(), 0xa5, bytes);
  }
#endif

  AtenTensorHandle handle_ = nullptr;
};

}  // namespace freedave
