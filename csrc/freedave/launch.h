#pragma once

// How an op's header declares what starts its kernels: a function `launch` for each device that it has kernels for. The
// type of the parameters says which op is meant. Parameters are taken as checked.
#include <cstdint>

struct CUstream_st;  // a cudaStream_t points to it

namespace freedave::cpu {

// Runs body(begin, end, context) over disjoint ranges that cover [begin, end), of at least `grain` items where there
// are as many, on the caller's threads. csrc/torch binds it to torch's thread pool, so torch.set_num_threads is obeyed.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                             void* context);

}  // namespace freedave::cpu

namespace freedave::cuda {

// Launchers are asynchronous on `stream` of the current device. They allocate, copy and wait for nothing, so every call
// can be captured in a graph.
using Stream = CUstream_st*;
using Error = int;  // a cudaError_t

}  // namespace freedave::cuda
