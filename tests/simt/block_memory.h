#pragma once

// The memory of the block that runs: stacks, parameters and shared memory. Shared memory is full of poison when a block
// begins, and behind each variable lies a red zone that must be intact when it ends.
#include <cstddef>
#include <cstdint>

#include "fiber.h"
#include "scheduler.h"

namespace simt {

class BlockMemory {
 public:
  // Before the blocks of a launch, and before each of them. Poison is a huge number, NaN or random by the schedule: no
  // one pattern shows in a sum, a minimum and a maximum alike.
  void begin_launch(int threads, const Kernel& kernel, const Schedule& schedule);
  void begin_block();
  // After a block that did not fail: the shared variable behind which something was written, or null.
  const char* overrun() const;
  void end_block();

  char* stack(int thread) const { return stacks_ + static_cast<std::size_t>(thread) * kStackBytes + kGuardBytes; }
  static constexpr std::size_t stack_bytes() { return kStackBytes - kGuardBytes; }
  const char* parameters() const { return parameters_; }

  // `bytes` of shared memory at an aligned place, or null when there is no room.
  void* allocate(std::size_t bytes, std::size_t alignment, const char* name);

 private:
  static constexpr std::size_t kGuardBytes = 4096;
  // Frames grow under sanitizers.
  static constexpr std::size_t kStackBytes = kGuardBytes + (SIMT_ASAN || SIMT_TSAN ? 256 : 64) * 1024;
  static constexpr std::size_t kArenaBytes = 3 * kMaxSharedBytes;
  static constexpr std::size_t kRedZoneBytes = 32;
  static constexpr int kMaxVariables = 256;

  struct Variable {
    const char* name;
    char *begin, *end;
  };

  void map(int threads);
  void poison(char* begin, const char* end);

  Kernel kernel_{};
  int threads_ = 0;
  Schedule schedule_;
  std::uint64_t random_ = 0;
  std::size_t mapped_bytes_ = 0;
  char *parameters_ = nullptr, *arena_ = nullptr, *stacks_ = nullptr;
  char *free_ = nullptr, *dirty_ = nullptr;  // where unused shared memory begins, now and when it was last poisoned
  Variable variables_[kMaxVariables];
  int num_variables_ = 0;
};

}  // namespace simt
