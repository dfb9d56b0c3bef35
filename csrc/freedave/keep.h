#pragma once
#include <cstdint>

#include "freedave/host_device.h"
#include "freedave/launch.h"
#include "freedave/rows.h"

namespace freedave {

// Keys or values: the windows [N, B, K, L, G, D] and the slots [N, S, C, G, D] that they go to. Features of a group are
// contiguous; strides are in bytes and of the other dimensions, outermost first.
struct KeptFeatures {
  static constexpr int kWindowDims = 5, kStoredDims = 4;
  const char* window;
  char* stored;
  int64_t window_stride[kWindowDims];
  int64_t stored_stride[kStoredDims];

  HD const char* window_at(int64_t layer, int64_t row, int64_t draft, int64_t position, int64_t group) const {
    return window + layer * window_stride[0] + row * window_stride[1] + draft * window_stride[2] +
           position * window_stride[3] + group * window_stride[4];
  }
  HD char* stored_at(int64_t layer, int64_t slot, int64_t position, int64_t group) const {
    return stored + layer * stored_stride[0] + slot * stored_stride[1] + position * stored_stride[2] +
           group * stored_stride[3];
  }
};

inline KeptFeatures kept_features(const void* window, const int64_t* window_strides, void* stored,
                                  const int64_t* stored_strides, int64_t element_bytes) {
  KeptFeatures f{static_cast<const char*>(window), static_cast<char*>(stored), {}, {}};
  for (int d = 0; d < KeptFeatures::kWindowDims; ++d) f.window_stride[d] = window_strides[d] * element_bytes;
  for (int d = 0; d < KeptFeatures::kStoredDims; ++d) f.stored_stride[d] = stored_strides[d] * element_bytes;
  return f;
}

struct KeptSizes {
  int64_t layers, batch, drafts, length, groups, group_bytes, num_slots, capacity;
};

struct KeepParams : KeptSizes {
  Counts accepted, start, count;  // [B]
  Counts slots;                   // [B]; where not given, row b has slot b
  KeptFeatures features[2];       // keys, values
};

// Of a row: window positions [begin, end) of a draft go to a slot, the position p to start + p.
struct KeptWindow {
  int64_t draft, slot, start, begin, end;
};

// Whatever the numbers are, the positions of a window that is not empty lie in the tensors.
HD KeptWindow kept_window(const KeepParams& p, int64_t row) {
  const int64_t count = p.count.at(row);
  if (count <= 0) return {};
  const int64_t draft = p.accepted.at(row), start = p.start.at(row), slot = p.slots.data ? p.slots.at(row) : row;
  const bool there = 0 <= draft && draft < p.drafts && 0 <= slot && slot < p.num_slots;
  if (!there || start <= -p.length || start >= p.capacity) return {};
  const int64_t most = count < p.length ? count : p.length, room = p.capacity - start;
  return {draft, slot, start, start < 0 ? -start : 0, most < room ? most : room};
}

// The same copies, with all groups of a position as one where they lie side by side in every tensor.
inline KeepParams with_groups_joined(KeepParams p) {
  for (const KeptFeatures& f : p.features) {
    if (f.window_stride[4] != p.group_bytes || f.stored_stride[3] != p.group_bytes) return p;
  }
  p.group_bytes *= p.groups;
  p.groups = 1;
  return p;
}

namespace cpu {
void launch(const KeepParams& p, ParallelFor run);
}

namespace cuda {
Error launch(const KeepParams& p, Stream stream);  // one kernel
}

}  // namespace freedave
