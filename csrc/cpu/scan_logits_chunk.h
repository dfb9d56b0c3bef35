#pragma once
#include <stdint.h>

#include "freedave/logit_types.h"
#include "freedave/online_softmax.h"

namespace freedave::cpu {

inline constexpr int kTile = 2048;  // elements that are read at a time; 8 KB of float32

// A stretch of one row's logits: the unit of work of scan_logits, and what the SIMD kernels see.
struct Chunk {
  const void* logits;
  int64_t size;
  int64_t first_token;                  // token id of logits[0]
  const int64_t* suppressed = nullptr;  // sorted token ids within the chunk
  int64_t num_suppressed = 0;
  bool fetch_ahead = false;
  // Where tokens may be drawn. The first token is then a multiple of 4.
  bool draws = false;  // from this chunk; else its choice is the largest logit
  float scale = 1.0f;  // what logits are multiplied by
  float floor = -INFINITY;
  NoiseKey key{};
  float* tops = nullptr;  // the largest logit of each tile, scaled, is written here
  // What this thread reads after the chunk, to be fetched meanwhile; null if that is not known.
  const void* next = nullptr;
  int64_t next_size = 0;
};

// How chunks are scanned, and how a token is drawn from one afterwards, when it is known what the rest of the row has:
// a token that can do better than `best`, or does as well and is a lower one, unless it does worse than `bar`. Then
// another one, somewhere in the row, is drawn anyway.
struct ChunkKernel {
  OnlineSoftmax (*scan)(const Chunk&) = nullptr;  // where a token is drawn, its choice is the largest logit's
  NoisyChoice (*draw)(const Chunk&, const NoisyChoice& best, float bar) = nullptr;
};

// The kernel for such logits and such a measure, drawing a token or not, compiled for each instruction set. Its scan is
// null for what is neither.
ChunkKernel chunk_kernel_baseline(LogitType logit_type, Measure measure, bool drawn);
ChunkKernel chunk_kernel_avx2(LogitType logit_type, Measure measure, bool drawn);
ChunkKernel chunk_kernel_avx512(LogitType logit_type, Measure measure, bool drawn);

}  // namespace freedave::cpu
