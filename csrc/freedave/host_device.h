#pragma once

// Functions marked HD are the contract as code: the CPU kernels and the CUDA kernels compile the same text.
// On the host they are always inlined: a copy left out of line by a file compiled for AVX-512 could be the one the
// linker keeps for every file.
#if defined(__CUDACC__)
#define HD __host__ __device__ __forceinline__
#else
#define HD inline __attribute__((always_inline))
#endif
