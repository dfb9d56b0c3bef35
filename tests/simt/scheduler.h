#pragma once

#include <cstdint>
#include <string>

#include "simt/emulator.h"

namespace simt {

// In which order blocks run, and threads between two barriers.
struct Schedule {
  enum class Order { kForward, kReverse, kRandom } order = Order::kForward;
  std::uint64_t seed = 0;
};

struct Outcome {
  std::string failure;  // empty when there was none
  std::size_t static_shared_bytes = 0;
};

// Runs every block of a grid that has been checked. One launch at a time: the caller holds a lock.
Outcome run(const cudaLaunchConfig_t& config, const Kernel& kernel, const Schedule& schedule, bool programmatic);

// To ThreadSanitizer: the host has waited for every launch so far.
void host_waits();

inline constexpr std::size_t kMaxSharedBytes = 48 * 1024;  // what every architecture gives without asking
inline constexpr int kMaxThreads = 1024;

}  // namespace simt
