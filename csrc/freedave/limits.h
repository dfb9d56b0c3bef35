#pragma once
#include <cstdint>

namespace freedave {

// What the CUDA kernels serve: a window is one block of threads, and the agreement of drafts is one word of bits.
inline constexpr int64_t kMaxLength = 1024;
inline constexpr int64_t kMaxDrafts = 32;

}  // namespace freedave
