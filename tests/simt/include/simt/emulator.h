#pragma once

// What the device functions of <cuda_runtime.h> ask of the emulator. They stand behind these calls rather than in the
// header because scheduler.cpp is never instrumented by ThreadSanitizer: what the emulator does for all fibers at once
// would look like races between them.
#include <cstddef>
#include <cstdint>
#include <source_location>

#include "cuda_runtime_api.h"

namespace simt {

// Where a collective stands in the source: the default argument of every collective.
using Site = std::source_location;

// Ends the launch with this message, and never returns to the kernel.
[[noreturn]] void fail(const Site& site, const char* format, ...) __attribute__((format(printf, 2, 3)));

// Waits until every lane in `mask` has come to the collective `name` at `site` with this mask. With `fold`, all get the
// values folded in the order of lanes; without, each gets the value of its `source` lane.
using Fold = std::uint64_t (*)(std::uint64_t, std::uint64_t);
std::uint64_t meet_warp(const char* name, const Site& site, unsigned mask, std::uint64_t value, Fold fold, int source);

// Waits until every thread of the block that has not exited has come to the same barrier.
struct Arrivals {
  int threads;
  int nonzero;  // of them with a predicate other than 0
};
Arrivals meet_block(const char* name, const Site& site, bool predicate);

int lane_of_caller(const Site& site);

// One a FREEDAVE_SHARED; `address` is that of block number `block`.
struct SharedVariable {
  std::size_t size, alignment;
  const char* name;
  std::uint64_t block = 0;
  void* address = nullptr;
};
void* shared_variable(SharedVariable& variable, const Site& site = Site::current());
void* dynamic_shared(const Site& site = Site::current());

// Parameters lie one after another in `parameters`, as for a GPU; `call` takes them from there and runs one thread.
inline constexpr std::size_t kMaxParameterBytes = 4096;  // what every architecture and toolkit takes
struct Kernel {
  const void* address;
  void (*call)(const void* address, const char* parameters);
  const char* parameters;
  std::size_t parameter_bytes;
};
cudaError_t launch(const cudaLaunchConfig_t& config, const Kernel& kernel);

void wait_for_previous_kernel(const Site& site);

}  // namespace simt
