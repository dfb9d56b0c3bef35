#include "block_memory.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "random.h"

#if SIMT_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace simt {
namespace {

constexpr char kRedZone = 0x5a;

}  // namespace

void BlockMemory::map(int threads) {
  mapped_bytes_ = kMaxParameterBytes + kArenaBytes + static_cast<std::size_t>(threads) * kStackBytes;
  void* memory =
      mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("simt: no memory for the stacks of a block");
    std::abort();
  }
  parameters_ = static_cast<char*>(memory);
  arena_ = parameters_ + kMaxParameterBytes;
  stacks_ = arena_ + kArenaBytes;
}

void BlockMemory::begin_launch(int threads, const Kernel& kernel, const Schedule& schedule) {
  kernel_ = kernel;
  threads_ = threads;
  schedule_ = schedule;
  random_ = schedule.seed;
  if (!SIMT_TSAN && mapped_bytes_ == 0) {
    map(kMaxThreads);
    for (int thread = 0; thread < kMaxThreads; ++thread) mprotect(stack(thread) - kGuardBytes, kGuardBytes, PROT_NONE);
  }
  dirty_ = arena_ + kArenaBytes;
}

void BlockMemory::begin_block() {
  if (SIMT_TSAN) {
    // New memory for every block: ThreadSanitizer forgets who used the addresses before, and blocks are not ordered.
    map(threads_);
    dirty_ = arena_ + kArenaBytes;
  }
  std::memcpy(parameters_, kernel_.parameters, kernel_.parameter_bytes);
#if SIMT_ASAN
  __asan_unpoison_memory_region(arena_, kArenaBytes);
#endif
  poison(arena_, dirty_);
#if SIMT_ASAN
  __asan_poison_memory_region(arena_, kArenaBytes);
#endif
  free_ = dirty_ = arena_;
  num_variables_ = 0;
}

void BlockMemory::poison(char* begin, const char* end) {
  const std::size_t bytes = static_cast<std::size_t>(end - begin);
  switch (schedule_.order) {
    case Schedule::Order::kForward:
      std::memset(begin, 0x7f, bytes);  // 3.4e38 as float, 1.4e306 as double, 2139062143 as int
      break;
    case Schedule::Order::kReverse:
      std::memset(begin, 0xff, bytes);  // NaN, -1
      break;
    case Schedule::Order::kRandom:
      for (std::size_t i = 0; i < bytes; i += sizeof(std::uint64_t)) {
        const std::uint64_t word = next_random(random_);
        std::memcpy(begin + i, &word, sizeof(word));
      }
      break;
  }
}

void* BlockMemory::allocate(std::size_t bytes, std::size_t alignment, const char* name) {
  if (alignment < 16) alignment = 16;
  char* begin = arena_ + (static_cast<std::size_t>(free_ - arena_) + alignment - 1) / alignment * alignment;
  char* end = begin + bytes;
  char* next = end + kRedZoneBytes;
  if (next > arena_ + kArenaBytes || num_variables_ == kMaxVariables) return nullptr;
#if SIMT_ASAN
  __asan_unpoison_memory_region(begin, bytes);
#else
  for (char* byte = end; byte < next; ++byte) *static_cast<volatile char*>(byte) = kRedZone;
#endif
  variables_[num_variables_++] = {name, begin, end};
  next += (8 - reinterpret_cast<std::uintptr_t>(next) % 8) % 8;
  free_ = dirty_ = next;
  return begin;
}

const char* BlockMemory::overrun() const {
  if (SIMT_ASAN) return nullptr;  // which has seen it already
  for (int v = 0; v < num_variables_; ++v) {
    for (std::size_t i = 0; i < kRedZoneBytes; ++i) {
      if (variables_[v].end[i] != kRedZone) return variables_[v].name;
    }
  }
  return nullptr;
}

void BlockMemory::end_block() {
  if (SIMT_TSAN) munmap(parameters_, mapped_bytes_);
}

}  // namespace simt
