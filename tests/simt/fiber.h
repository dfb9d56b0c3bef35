#pragma once

// A thread of a kernel: a stack and a place to go on from. Switching costs some ten instructions, and tells
// AddressSanitizer and ThreadSanitizer, where they are there, whose stack runs now.
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#else
#define SIMT_ASAN 0
#endif
// The emulator itself is never instrumented by ThreadSanitizer, so the build has to say that the kernels are.
#if !defined(SIMT_TSAN)
#define SIMT_TSAN 0
#endif
// A hand-written switch where we have one. ucontext asks the kernel for the signal mask at every switch.
#if !defined(SIMT_UCONTEXT)
#if defined(__x86_64__) && defined(__ELF__)
#define SIMT_UCONTEXT 0
#else
#define SIMT_UCONTEXT 1
#endif
#endif

#if SIMT_UCONTEXT
#include <ucontext.h>
#endif

namespace simt {

struct Fiber {
  char* stack = nullptr;  // null for the stack of the host
  std::size_t stack_bytes = 0;
#if SIMT_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  void* left_at = nullptr;     // a frame below which nothing is alive
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;        // ThreadSanitizer's
};

// Makes `fiber` begin at `entry`, which never returns, on its stack.
void prepare(Fiber& fiber, void (*entry)());

// First thing in `entry`.
void has_begun();

// Goes on with `to`; returns when something switches back to `from`.
void switch_to(Fiber& from, Fiber& to);

}  // namespace simt
