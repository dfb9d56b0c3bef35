// The first positions of each row's accepted draft, copied to the row's slot. A thread owns a row of a layer.
#include "freedave/keep.h"

#include <algorithm>
#include <cstring>

#include "cpu/parallel.h"

namespace freedave::cpu {
namespace {

constexpr int64_t kBytesPerVisit = 16;  // copied in the time that a visit of a position takes

void copy_window(const KeepParams& p, const KeptFeatures& f, int64_t layer, int64_t row, const KeptWindow& kept) {
  for (int64_t position = kept.begin; position < kept.end; ++position) {
    for (int64_t group = 0; group < p.groups; ++group) {
      std::memcpy(f.stored_at(layer, kept.slot, kept.start + position, group),
                  f.window_at(layer, row, kept.draft, position, group), p.group_bytes);
    }
  }
}

}  // namespace

void launch(const KeepParams& given, ParallelFor run) {
  const KeepParams p = with_groups_joined(given);
  int64_t positions = 0;  // to copy in a layer
  for (int64_t row = 0; row < p.batch; ++row) {
    const KeptWindow kept = kept_window(p, row);
    positions += std::max<int64_t>(kept.end - kept.begin, 0);
  }
  const int64_t bytes = 2 * positions * p.groups * p.group_bytes;
  if (bytes == 0) return;
  const int64_t work = bytes / p.batch / kBytesPerVisit;
  parallel_for(run, p.layers * p.batch, grain_for(work), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t layer = i / p.batch, row = i % p.batch;
      const KeptWindow kept = kept_window(p, row);
      for (const KeptFeatures& f : p.features) copy_window(p, f, layer, row, kept);
    }
  });
}

}  // namespace freedave::cpu
