#pragma once
#include <stdint.h>

#include "freedave/logit_types.h"
#include "freedave/online_softmax.h"

namespace freedave::cpu {

// A stretch of one row's logits: the unit of work of scan_logits, and what the SIMD kernels see.
struct Chunk {
  const void* logits;
  int64_t size;
  int64_t first_token;                  // token id of logits[0]
  const int64_t* suppressed = nullptr;  // sorted token ids within the chunk
  int64_t num_suppressed = 0;
  bool fetch_ahead = false;
  // Above 0 where a token is drawn; the first token is then a multiple of 4.
  float inverse_temperature = 0.0f;
  float floor = -INFINITY;
  NoiseKey key{};
  // What this thread reads after the chunk, to be fetched meanwhile; null if that is not known.
  const void* next = nullptr;
  int64_t next_size = 0;
};

using ChunkKernel = OnlineSoftmax (*)(const Chunk&);

// The kernel that scans such logits for such a measure, drawing a token or not, compiled for each instruction set. Null
// for what is neither.
ChunkKernel chunk_kernel_baseline(LogitType logit_type, Measure measure, bool drawn);
ChunkKernel chunk_kernel_avx2(LogitType logit_type, Measure measure, bool drawn);
ChunkKernel chunk_kernel_avx512(LogitType logit_type, Measure measure, bool drawn);

}  // namespace freedave::cpu
