#pragma once

// A CUDA runtime whose kernels run on the CPU, for tests (see ../README.md). A C++ compiler that finds this header
// instead of NVIDIA's compiles csrc/cuda as it is.
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cuda_runtime_api.h"
#include "simt/atomics.h"
#include "simt/collectives.h"
#include "simt/control.h"
#include "simt/emulator.h"
#include "simt/shared_memory.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

// Of the thread that runs now.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1) << (31 - bit);
  return reversed;
}
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}
// Threads run one at a time on one CPU thread, so memory is never out of order.
inline void __threadfence() {}

// Of two numbers of any types, in their common type; a NaN loses against a number.
template <typename A, typename B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmin(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}
template <typename A, typename B>
  requires std::is_arithmetic_v<A> && std::is_arithmetic_v<B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return std::fmax(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) > static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}

namespace simt {

// Where each parameter lies, and behind the last one the size of all.
template <typename... Params>
constexpr auto parameter_offsets() {
  struct {
    std::size_t at[sizeof...(Params) + 1] = {};
  } offsets;
  constexpr std::size_t sizes[] = {sizeof(Params)..., 0}, alignments[] = {alignof(Params)..., 1};
  std::size_t end = 0;
  for (std::size_t i = 0; i <= sizeof...(Params); ++i) {
    offsets.at[i] = (end + alignments[i] - 1) / alignments[i] * alignments[i];
    end = offsets.at[i] + sizes[i];
  }
  return offsets;
}

template <typename... Params>
void call(const void* address, const char* parameters) {
  const auto kernel = reinterpret_cast<void (*)(Params...)>(const_cast<void*>(address));
  constexpr auto offsets = parameter_offsets<Params...>();
  [&]<std::size_t... i>(std::index_sequence<i...>) {
    kernel(*reinterpret_cast<const Params*>(parameters + offsets.at[i])...);
  }(std::index_sequence_for<Params...>{});
}

}  // namespace simt

// Runs the kernel before it returns; a launch that fails returns an error that cudaGetErrorString explains.
template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "a kernel is launched with all its parameters");
  static_assert((std::is_trivially_copyable_v<Params> && ...), "parameters are copied as bytes");
  constexpr auto offsets = simt::parameter_offsets<Params...>();
  constexpr std::size_t size = offsets.at[sizeof...(Params)];
  static_assert(size <= simt::kMaxParameterBytes);
  alignas(16) char parameters[size + 1];
  std::size_t i = 0;
  [[maybe_unused]] const auto store = [&]<typename Param>(const Param& value) {
    std::memcpy(parameters + offsets.at[i++], &value, sizeof(value));
  };
  (store(static_cast<const Params&>(args)), ...);
  return simt::launch(*config, {reinterpret_cast<const void*>(kernel), simt::call<Params...>, parameters, size});
}
