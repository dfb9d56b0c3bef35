#pragma once
#include <stdint.h>

#include "freedave/online_softmax.h"

namespace freedave::cpu {

// A stretch of one row's logits: the unit of work of predict_tokens, and what the SIMD kernels see.
struct Chunk {
  const void* logits;
  int64_t size;
  int64_t first_token;                  // token id of logits[0]
  const int64_t* suppressed = nullptr;  // sorted token ids within the chunk
  int64_t num_suppressed = 0;
  bool fetch_ahead = false;
  // What this thread reads after the chunk, to be fetched meanwhile; null if that is not known.
  const void* next = nullptr;
  int64_t next_size = 0;
};

using ChunkKernel = OnlineSoftmax (*)(const Chunk&);

// logit_type and measure index the table as their enums count.
struct ChunkKernels {
  ChunkKernel kernel[3][3];
};

const ChunkKernels& chunk_kernels_baseline();
const ChunkKernels& chunk_kernels_avx2();
const ChunkKernels& chunk_kernels_avx512();

}  // namespace freedave::cpu
