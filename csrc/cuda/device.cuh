#pragma once

// What the kernels know of the hardware, and the only file with inline PTX. Everything has a plain C++ twin, so that
// the same kernels also compile with a C++ compiler against another <cuda_runtime.h>, which tests execute on a CPU.
#include <cuda_runtime.h>
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "freedave/host_device.h"
#include "freedave/logit_types.h"

// A variable in shared memory. The emulator brings its own, so that every block starts with poisoned memory.
#if !defined(FREEDAVE_SHARED)
#define FREEDAVE_SHARED(Type, name) __shared__ Type name
#endif

namespace freedave::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

// Programmatic dependent launch, sm_90 and later: a kernel may be resident before the one ahead of it in the stream has
// finished. Nothing that an earlier kernel wrote may be read before wait_for_previous_kernel.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#elif defined(FREEDAVE_SIMT)
  cudaGridDependencySynchronize();  // the emulator refuses an overlapping launch of a kernel that never waits
#endif
}

__device__ __forceinline__ void let_next_kernel_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#elif defined(FREEDAVE_SIMT)
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

// 16 bytes that nothing writes during the kernel, from a 16-byte boundary. Past L1: logits are read once.
__device__ __forceinline__ uint4 load_16_bytes(const void* pointer) {
#if defined(__CUDA_ARCH__)
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(pointer));
  return v;
#else
  return *static_cast<const uint4*>(pointer);
#endif
}

// Copies 4 or 8 bytes to shared memory. They are there, for this thread, after wait_for_copies: many may be under way.
template <typename T>
__device__ __forceinline__ void copy_later(T* shared, const T* global) {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;"
               :
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))), "l"(global), "n"(sizeof(T))
               : "memory");
#else
  *shared = *global;
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// 2^x with relative error below 3e-7; 0 below 2^-126. Flushing denormals saves two instructions an element.
__device__ __forceinline__ float exp2_flushed(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126.0f ? 0.0f : exp2f(x);
#endif
}

// The logarithm to base 2, to 5e-6 down to 2^-24; of 0 it is -inf.
__device__ __forceinline__ float log2_flushed(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return log2f(x);
#endif
}

// What is in shared memory now, where other threads change it at any time.
__device__ __forceinline__ int32_t load_shared_now(const int32_t& shared) {
#if defined(__CUDA_ARCH__)
  return *const_cast<const volatile int32_t*>(&shared);
#else
  return __atomic_load_n(&shared, __ATOMIC_RELAXED);
#endif
}

// What all lanes hold alike, as the compiler knows it then: such numbers have registers and instructions of their own.
__device__ __forceinline__ uint32_t same_in_warp(uint32_t x) { return __reduce_min_sync(kFullWarp, x); }
__device__ __forceinline__ uint64_t same_in_warp(uint64_t x) {
  const uint32_t low = same_in_warp(static_cast<uint32_t>(x)), high = same_in_warp(static_cast<uint32_t>(x >> 32));
  return static_cast<uint64_t>(high) << 32 | low;
}

__device__ __forceinline__ float warp_max(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

// Launches `kernel`; where the device can, before the kernel ahead of it in the stream has drained.
template <typename... Params, typename... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), dim3 grid, unsigned threads, cudaStream_t stream,
                          const Args&... args) {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = major >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace freedave::cuda
