// Runs blocks one after another and the threads of a block as fibers on one CPU thread. A fiber runs until it comes to
// a barrier or a warp collective; which goes on then is up to the schedule, always the worst it can think of: forward,
// the first thread that can, so that one warp runs far ahead of the next; reverse, the last; random, any.
#include "scheduler.h"

#include <algorithm>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <vector>

#include "block_memory.h"
#include "fiber.h"
#include "random.h"

#if SIMT_TSAN
#include <sanitizer/tsan_interface.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {
namespace {

constexpr int kWarpSize = 32;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;

// Ordering as ThreadSanitizer shall see it: everything before the releases of a point happens before its acquires.
using SyncPoint = char*;

void release([[maybe_unused]] SyncPoint point) {
#if SIMT_TSAN
  __tsan_release(point);
#endif
}

void acquire([[maybe_unused]] SyncPoint point) {
#if SIMT_TSAN
  __tsan_acquire(point);
#endif
}

// One for each meeting of threads. Used again only after thousands of others: a point remembers all its releases.
SyncPoint new_sync_point() {
  static char points[1 << 14];
  static std::size_t last = 0;
  last = (last + 8) % sizeof(points);
  return points + last;
}

char block_begins[8], grid_finished[2][8];  // sync points; the latter of this launch and of the one before, in turn

#if SIMT_TSAN
// To ThreadSanitizer, who runs as this thread. Creating such an identity takes half a millisecond, so they are kept,
// and chosen so that a block and the next, and a kernel and the next, have different ones: what is done twice under one
// identity is in order. What blocks owe one another is nothing, what kernels do is in wait_for_previous_kernel.
void* tsan_identity(std::uint64_t block, std::uint64_t launch, int thread) {
  static void* identities[4][kMaxThreads];
  void*& identity = identities[block % 2 + launch % 2 * 2][thread];
  if (identity == nullptr) identity = __tsan_create_fiber(0);
  return identity;
}
#endif

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

// A collective that threads wait in.
struct Meeting {
  const char* name = nullptr;  // null for none
  Site site;
  unsigned mask = 0;     // of a warp; 0 for a barrier of the block
  unsigned arrived = 0;  // lanes of a warp
  SyncPoint point = nullptr;

  bool is(const char* other_name, const Site& other_site, unsigned other_mask) const {
    return mask == other_mask && std::strcmp(name, other_name) == 0 && same(site, other_site);
  }
};

struct Thread {
  Fiber fiber;
  uint3 index{};
  Meeting waits_in;  // name is null while it can run
  std::uint64_t value = 0, result = 0;
  int source = 0;
};

struct Warp {
  unsigned present = 0, exited = 0;
  Meeting meetings[kWarpSize];  // lanes that went different ways may meet apart
  int num_meetings = 0;
};

struct Block {
  bool running = false;
  std::uint64_t number = 0, launch = 0;  // of all ever
  int threads = 0, exited = 0;
  Meeting barrier;
  Arrivals arrivals{}, barrier_result{};
  std::size_t static_shared_bytes = 0, dynamic_shared_bytes = 0;
  void* dynamic_shared = nullptr;
  bool failed = false;
  char failure[2048];
};

BlockMemory memory;
Thread threads[kMaxThreads];
Warp warps[kMaxWarps];
Block block;
Fiber host;
Thread* current = nullptr;
Kernel kernel;
bool has_waited;  // some thread of this launch, for the previous kernel
Schedule schedule;
std::uint64_t random_state;
std::uint64_t ready[kMaxThreads / 64];  // a bit a thread
int random_start;

int id_of(const Thread& thread) { return static_cast<int>(&thread - threads); }
Warp& warp_of(int thread) { return warps[thread / kWarpSize]; }
unsigned bit_of(int thread) { return 1u << thread % kWarpSize; }

void make_ready(int thread) {
  ready[thread / 64] |= std::uint64_t{1} << thread % 64;
  threads[thread].waits_in.name = nullptr;
}
void make_wait(int thread, const Meeting& meeting) {
  ready[thread / 64] &= ~(std::uint64_t{1} << thread % 64);
  threads[thread].waits_in = meeting;
}

int first_ready(int from) {
  const int words = (block.threads + 63) / 64;
  for (int word = from / 64; word < words; ++word) {
    const std::uint64_t bits = word == from / 64 ? ready[word] & ~std::uint64_t{0} << from % 64 : ready[word];
    if (bits) return word * 64 + std::countr_zero(bits);
  }
  return -1;
}

int last_ready() {
  for (int word = (block.threads - 1) / 64; word >= 0; --word) {
    if (ready[word]) return word * 64 + 63 - std::countl_zero(ready[word]);
  }
  return -1;
}

// The thread to go on with, -1 when none can.
int pick() {
  if (schedule.order == Schedule::Order::kForward) return first_ready(0);
  if (schedule.order == Schedule::Order::kReverse) return last_ready();
  // Now and then a new place to look from: short steps of all threads, and long runs of some.
  const std::uint64_t number = next_random(random_state);
  if (number % 8 == 0) random_start = static_cast<int>((number >> 8) % static_cast<unsigned>(block.threads));
  const int found = first_ready(random_start);
  return found >= 0 ? found : first_ready(0);
}

// Goes on with another thread, or with the host when the block is over or stuck.
void yield() {
  Thread& self = *current;
  const int next = block.failed ? -1 : pick();
  if (next >= 0 && &threads[next] == &self) return;
  if (next >= 0) {
    current = &threads[next];
    threadIdx = current->index;
    switch_to(self.fiber, current->fiber);
  } else {
    switch_to(self.fiber, host);
  }
}

void describe(char* text, std::size_t size, const Meeting& meeting) {
  if (meeting.mask != 0) {
    std::snprintf(text, size, "%s with mask 0x%08x (%s:%u)", meeting.name, meeting.mask, meeting.site.file_name(),
                  static_cast<unsigned>(meeting.site.line()));
  } else {
    std::snprintf(text, size, "%s (%s:%u)", meeting.name, meeting.site.file_name(),
                  static_cast<unsigned>(meeting.site.line()));
  }
}

void open_barrier() {
  block.barrier_result = block.arrivals;
  block.arrivals = {};
  block.barrier.name = nullptr;
  for (int thread = 0; thread < block.threads; ++thread) {
    if (threads[thread].waits_in.name != nullptr && threads[thread].waits_in.mask == 0) make_ready(thread);
  }
}

void exit_thread() {
  const int self = id_of(*current);
  Warp& warp = warp_of(self);
  for (int m = 0; m < warp.num_meetings; ++m) {
    if (warp.meetings[m].mask & bit_of(self)) {
      char text[512];
      describe(text, sizeof(text), warp.meetings[m]);
      fail(warp.meetings[m].site, "exits while lanes 0x%08x wait for it in %s", warp.meetings[m].arrived, text);
    }
  }
  release(grid_finished[block.launch % 2]);
  warp.exited |= bit_of(self);
  ready[self / 64] &= ~(std::uint64_t{1} << self % 64);
  ++block.exited;
  // Those that have exited are not waited for.
  if (block.barrier.name != nullptr && block.arrivals.threads == block.threads - block.exited) open_barrier();
  yield();
}

void begin_thread() {
  has_begun();
  acquire(block_begins);
  kernel.call(kernel.address, memory.parameters());
  exit_thread();
}

// Who waits where, by groups, when no thread can go on.
void describe_deadlock() {
  std::size_t used = 0;
  const auto add = [&](const char* format, auto... values) {
    if (used < sizeof(block.failure)) {
      used += static_cast<std::size_t>(
          std::snprintf(block.failure + used, sizeof(block.failure) - used, format, values...));
    }
  };
  add("deadlock, no thread can go on");
  int warps_shown = 0;
  for (int first = 0; first < block.threads && warps_shown < 4; first += kWarpSize) {
    unsigned waiting = warp_of(first).present & ~warp_of(first).exited;
    if (waiting == 0) continue;
    ++warps_shown;
    add("; warp %d:", first / kWarpSize);
    while (waiting) {
      const Meeting& meeting = threads[first + std::countr_zero(waiting)].waits_in;
      unsigned together = 0;
      for (unsigned lanes = waiting; lanes; lanes &= lanes - 1) {
        const Meeting& other = threads[first + std::countr_zero(lanes)].waits_in;
        if (other.is(meeting.name, meeting.site, meeting.mask)) together |= lanes & -lanes;
      }
      char text[512];
      describe(text, sizeof(text), meeting);
      add(" lanes 0x%08x wait in %s", together, text);
      waiting &= ~together;
    }
    if (warp_of(first).exited) add(" lanes 0x%08x have exited", warp_of(first).exited);
  }
}

void begin_block() {
  const int count = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
  ++block.number;
  block.threads = count;
  block.exited = 0;
  block.barrier.name = nullptr;
  block.arrivals = {};
  block.static_shared_bytes = 0;
  std::fill(std::begin(ready), std::end(ready), 0);
  memory.begin_block();
  if (block.dynamic_shared_bytes > 0) {
    block.dynamic_shared = memory.allocate(block.dynamic_shared_bytes, 128, "dynamic shared memory");
  }
  for (int w = 0; w * kWarpSize < count; ++w) {
    const int lanes = std::min(kWarpSize, count - w * kWarpSize);
    warps[w].present = lanes == kWarpSize ? ~0u : (1u << lanes) - 1;
    warps[w].exited = 0;
    warps[w].num_meetings = 0;
  }
  uint3 index{0, 0, 0};
  for (int t = 0; t < count; ++t) {
    Thread& thread = threads[t];
    thread.index = index;
    if (++index.x == blockDim.x) index = {0, index.y + 1, index.z};
    if (index.y == blockDim.y) index = {0, 0, index.z + 1};
    thread.fiber.stack = memory.stack(t);
    thread.fiber.stack_bytes = BlockMemory::stack_bytes();
    prepare(thread.fiber, begin_thread);
#if SIMT_TSAN
    thread.fiber.tsan = tsan_identity(block.number, block.launch, t);
#endif
    make_ready(t);
  }
  release(block_begins);
}

void run_block() {
  begin_block();
#if SIMT_TSAN
  host.tsan = __tsan_get_current_fiber();
#endif
  block.running = true;
  current = &threads[pick()];
  threadIdx = current->index;
  switch_to(host, current->fiber);
  block.running = false;
  if (!block.failed) {
    const char* overrun = memory.overrun();
    block.failed = block.exited < block.threads || overrun != nullptr;
    if (block.exited < block.threads) {
      describe_deadlock();
    } else if (overrun != nullptr) {
      std::snprintf(block.failure, sizeof(block.failure), "wrote beyond the end of shared variable '%s'", overrun);
    }
  }
#if SIMT_TSAN
  // Threads dropped where they stood have done what they did before the host goes on.
  for (int t = 0; block.failed && t < block.threads; ++t) {
    __tsan_switch_to_fiber(threads[t].fiber.tsan, __tsan_switch_to_fiber_no_sync);
    release(grid_finished[block.launch % 2]);
  }
  __tsan_switch_to_fiber(host.tsan, __tsan_switch_to_fiber_no_sync);
  if (block.failed) host_waits();
#endif
  memory.end_block();
}

}  // namespace

void fail(const Site& site, const char* format, ...) {
  char what[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(what, sizeof(what), format, arguments);
  va_end(arguments);
  if (!block.running) {
    std::fprintf(stderr, "simt: device code called outside a kernel: %s:%u: %s\n", site.file_name(),
                 static_cast<unsigned>(site.line()), what);
    std::abort();
  }
  const int self = id_of(*current);
  std::snprintf(block.failure, sizeof(block.failure), "thread %d (warp %d, lane %d) at %s:%u: %s", self,
                self / kWarpSize, self % kWarpSize, site.file_name(), static_cast<unsigned>(site.line()), what);
  block.failed = true;
  yield();  // to the host; the fibers are dropped where they stand
  std::abort();
}

std::uint64_t meet_warp(const char* name, const Site& site, unsigned mask, std::uint64_t value, Fold fold, int source) {
  const int lane = lane_of_caller(site);
  Thread& self = *current;
  const int first = id_of(self) - lane;
  Warp& warp = warp_of(first);
  if (!(mask >> lane & 1)) fail(site, "%s: mask 0x%08x does not name the calling lane", name, mask);
  if (mask & ~warp.present) {
    fail(site, "%s: mask 0x%08x names absent lanes 0x%08x", name, mask, mask & ~warp.present);
  }
  if (mask & warp.exited) fail(site, "%s: mask 0x%08x names exited lanes 0x%08x", name, mask, mask & warp.exited);
  if (!fold && !(mask >> source & 1))
    fail(site, "%s: reads lane %d, which mask 0x%08x does not name", name, source, mask);

  int m = 0;
  while (m < warp.num_meetings && !warp.meetings[m].is(name, site, mask)) ++m;
  Meeting& meeting = warp.meetings[m];
  if (m == warp.num_meetings) {
    ++warp.num_meetings;
    meeting = {name, site, mask, 0, new_sync_point()};
  }
  const SyncPoint point = meeting.point;
  release(point);
  self.value = value;
  self.source = source;
  meeting.arrived |= 1u << lane;
  if (meeting.arrived != mask) {
    make_wait(id_of(self), meeting);
  } else {
    // The last to come does the work for all: any of them may be in the next collective before another has woken.
    Thread* lanes = threads + first;
    std::uint64_t folded = 0;
    if (fold) {
      unsigned rest = mask;
      folded = lanes[std::countr_zero(rest)].value;
      while (rest &= rest - 1) folded = fold(folded, lanes[std::countr_zero(rest)].value);
    }
    for (unsigned rest = mask; rest; rest &= rest - 1) {
      const int other = std::countr_zero(rest);
      lanes[other].result = fold ? folded : lanes[lanes[other].source].value;
      make_ready(first + other);
    }
    meeting = warp.meetings[--warp.num_meetings];
  }
  yield();
  acquire(point);
  return self.result;
}

Arrivals meet_block(const char* name, const Site& site, bool predicate) {
  lane_of_caller(site);
  if (block.barrier.name == nullptr) {
    block.barrier = {name, site, 0, 0, new_sync_point()};
  } else if (!block.barrier.is(name, site, 0)) {
    char text[512];
    describe(text, sizeof(text), block.barrier);
    fail(site, "divergent barrier: comes to %s while %d threads wait in %s", name, block.arrivals.threads, text);
  }
  const SyncPoint point = block.barrier.point;
  release(point);
  make_wait(id_of(*current), block.barrier);
  block.arrivals.nonzero += predicate;
  if (++block.arrivals.threads == block.threads - block.exited) open_barrier();
  yield();
  acquire(point);
  return block.barrier_result;
}

int lane_of_caller(const Site& site) {
  if (!block.running) fail(site, "no thread runs");
  return id_of(*current) % kWarpSize;
}

void* shared_variable(SharedVariable& variable, const Site& site) {
  lane_of_caller(site);
  if (variable.block == block.number) return variable.address;
  block.static_shared_bytes += variable.size;
  const std::size_t total = block.static_shared_bytes + block.dynamic_shared_bytes;
  if (total > kMaxSharedBytes) {
    fail(site, "shared variable '%s' makes it %zu bytes of shared memory; a block has %zu", variable.name, total,
         kMaxSharedBytes);
  }
  variable.block = block.number;
  variable.address = memory.allocate(variable.size, variable.alignment, variable.name);
  if (variable.address == nullptr) fail(site, "too many shared variables for the emulator");
  return variable.address;
}

void* dynamic_shared(const Site& site) {
  lane_of_caller(site);
  if (block.dynamic_shared_bytes == 0) fail(site, "the launch gave no dynamic shared memory");
  return block.dynamic_shared;
}

void wait_for_previous_kernel(const Site& site) {
  lane_of_caller(site);
  has_waited = true;
  acquire(grid_finished[(block.launch + 1) % 2]);
}

void host_waits() {
  for (SyncPoint launch : grid_finished) acquire(launch);
}

Outcome run(const cudaLaunchConfig_t& config, const Kernel& launched, const Schedule& how, bool programmatic) {
  // Kernels follow one another in the stream, except that one launched with programmatic serialization may begin early.
  if (!programmatic) host_waits();
  kernel = launched;
  schedule = how;
  random_state = how.seed;
  random_start = 0;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  block.dynamic_shared_bytes = config.dynamicSmemBytes;
  block.failed = false;
  ++block.launch;
  has_waited = false;
  memory.begin_launch(static_cast<int>(blockDim.x * blockDim.y * blockDim.z), kernel, schedule);

  const std::uint64_t blocks = std::uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  std::vector<std::uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  if (schedule.order == Schedule::Order::kReverse) std::reverse(order.begin(), order.end());
  if (schedule.order == Schedule::Order::kRandom) {
    for (std::uint64_t i = blocks - 1; i > 0; --i) std::swap(order[i], order[next_random(random_state) % (i + 1)]);
  }
  Outcome outcome;
  for (const std::uint64_t index : order) {
    blockIdx = {static_cast<unsigned>(index % gridDim.x), static_cast<unsigned>(index / gridDim.x % gridDim.y),
                static_cast<unsigned>(index / gridDim.x / gridDim.y)};
    run_block();
    outcome.static_shared_bytes = std::max(outcome.static_shared_bytes, block.static_shared_bytes);
    if (block.failed) {
      char where[64];
      std::snprintf(where, sizeof(where), "block (%u, %u, %u), ", blockIdx.x, blockIdx.y, blockIdx.z);
      outcome.failure = std::string(where) + block.failure;
      return outcome;
    }
  }
  if (programmatic && !has_waited) {
    // Nor would it be complete before the previous one: the next kernel, waiting for this one, would not wait for both.
    outcome.failure = "launched with programmatic serialization, but no thread calls cudaGridDependencySynchronize";
  }
  return outcome;
}

}  // namespace simt

// assert() of a kernel comes here rather than to the C library's, whose visibility it would share with no launch.
extern "C" __attribute__((visibility("hidden"), noreturn)) void __assert_fail(const char* condition, const char* file,
                                                                              unsigned line,
                                                                              const char* function) noexcept {
  if (!simt::block.running) {
    std::fprintf(stderr, "%s:%u: %s: Assertion `%s' failed.\n", file, line, function, condition);
    std::abort();
  }
  simt::fail(simt::Site::current(), "assertion failed: %s (%s:%u)", condition, file, line);
}
