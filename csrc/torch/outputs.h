#pragma once

// Results of the ops: new contiguous tensors.
#include <torch/csrc/stable/ops.h>

#include <cstring>

#include "torch/arguments.h"

namespace freedave {

// On the device of `like`. Its values are whatever the memory held.
inline Tensor new_tensor(const Argument& like, ScalarType type, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  const Tensor tensor = torch::stable::empty(sizes, type, std::nullopt, like.device);
#if FREEDAVE_EMULATED
  // What a kernel does not write must show in tests.
  const size_t bytes = static_cast<size_t>(tensor.numel()) * tensor.element_size();
  if (bytes > 0) memset(tensor.mutable_data_ptr(), 0xa5, bytes);
#endif
  return tensor;
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor new_tensor_like(const Argument& like, ScalarType type, bool wanted = true) {
  return wanted ? new_tensor(like, type, {like.sizes, static_cast<size_t>(like.dims)}) : new_tensor(like, type, {0});
}

}  // namespace freedave
