#pragma once
#include <cstdint>
#include <type_traits>

#include "freedave/launch.h"

namespace freedave::cpu {

// Runs body(begin, end) over disjoint ranges of [0, count). Work that fits in one grain stays on this thread: waking
// others takes longer than the work.
template <typename Body>
void parallel_for(ParallelFor run, int64_t count, int64_t grain, Body&& body) {
  if (count <= grain) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  run(
      0, count, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<std::remove_reference_t<Body>*>(context))(begin, end);
      },
      &body);
}

// How many rows are worth a thread of their own, when a row is about `work` visits of a position: some 150 us of them.
// One thread is done with less before several have started and met again, above all on a busy machine.
inline int64_t grain_for(int64_t work) { return work > 0 ? (int64_t{1} << 17) / work + 1 : int64_t{1} << 17; }

}  // namespace freedave::cpu
