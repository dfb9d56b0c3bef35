#pragma once
#include <cstdint>
#include <type_traits>

namespace freedave::cpu {

// Runs body(begin, end, context) over disjoint ranges that cover [begin, end), of at least `grain` items where there
// are as many, on the caller's threads. csrc/torch binds it to torch's thread pool, so torch.set_num_threads is obeyed.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                             void* context);

// The same for a lambda. Work that fits in one grain stays on this thread: waking others takes longer than the work.
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
