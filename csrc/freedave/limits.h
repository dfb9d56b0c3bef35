#pragma once
#include <cstdint>

namespace freedave {

// What the CUDA kernels serve: a window is one block of threads, the agreement of drafts is one word of bits, and a
// lane keeps three known states.
inline constexpr int64_t kMaxLength = 1024;
inline constexpr int64_t kMaxDrafts = 32;
inline constexpr int64_t kMaxPoolStates = 64;

}  // namespace freedave
