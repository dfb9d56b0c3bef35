#include "fiber.h"

#include <cstdint>

#if SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if SIMT_TSAN
#include <sanitizer/tsan_interface.h>
#endif

#if !SIMT_UCONTEXT
// Saves what a called function must preserve and the stack pointer, and takes those of the other fiber. The control
// words of the floating-point units are the same for all threads of a kernel.
extern "C" __attribute__((visibility("hidden"))) void simt_switch_stacks(void** from, void* to);
asm(R"(
.text
.hidden simt_switch_stacks
.globl simt_switch_stacks
.type simt_switch_stacks, @function
simt_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stacks, .-simt_switch_stacks
)");
#endif

namespace simt {
namespace {

// The fiber that was left for the one that runs: where a switch comes out, it must be told to AddressSanitizer.
Fiber* left = nullptr;

void finish_switch([[maybe_unused]] Fiber& now) {
#if SIMT_ASAN
  const void* bottom;
  std::size_t bytes;
  __sanitizer_finish_switch_fiber(now.fake_stack, &bottom, &bytes);
  if (left->stack == nullptr) {  // the host's, which only AddressSanitizer knows
    left->stack = static_cast<char*>(const_cast<void*>(bottom));
    left->stack_bytes = bytes;
  }
#endif
}

}  // namespace

void prepare(Fiber& fiber, void (*entry)()) {
  [[maybe_unused]] char* top = fiber.stack + fiber.stack_bytes;
#if SIMT_ASAN
  // Whatever ran here before left its frames' red zones.
  char* from = fiber.left_at ? static_cast<char*>(fiber.left_at) - 1024 : top;
  if (from < fiber.stack) from = fiber.stack;
  __asan_unpoison_memory_region(from, static_cast<std::size_t>(top - from));
#endif
  fiber.fake_stack = nullptr;
#if SIMT_UCONTEXT
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  // As if simt_switch_stacks had been called where `entry` begins: six registers, then the address that it returns to,
  // then the return address of `entry`, which is none.
  auto** words = reinterpret_cast<void**>(top);
  words[-1] = nullptr;
  words[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) words[-i] = nullptr;
  fiber.stack_pointer = words - 8;
#endif
}

void has_begun() {
#if SIMT_ASAN
  static Fiber begun;  // has no fake stack yet
  finish_switch(begun);
#endif
}

void switch_to(Fiber& from, Fiber& to) {
  from.left_at = __builtin_frame_address(0);
  left = &from;
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#if SIMT_TSAN
  __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if SIMT_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  simt_switch_stacks(&from.stack_pointer, to.stack_pointer);
#endif
  finish_switch(from);
}

}  // namespace simt
