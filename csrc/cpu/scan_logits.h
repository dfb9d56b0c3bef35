#pragma once
#include <cstdint>
#include <vector>

#include "cpu/parallel.h"
#include "freedave/predict_tokens.h"

namespace freedave::cpu {

// What a scan found: the softmax of each chunk of each masked row. The chunks of a row lie together, rows in the order
// of `masked`.
struct Scanned {
  const std::vector<int64_t>& masked;  // flat positions of [*, L]
  int64_t chunks;
  const OnlineSoftmax* partials;
};

// Where tokens are drawn: whether each chunk's choice counts or the first of a row's alone, which takes less work.
enum class DrawnFrom { kChunk, kRow };

// Valid until the calling thread's next scan.
Scanned scan_logits(const LogitsToScan& p, int64_t chunk, DrawnFrom scope, ParallelFor run);

}  // namespace freedave::cpu
