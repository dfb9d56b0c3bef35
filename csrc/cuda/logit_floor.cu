// floor[i] = the least logit of row i that top-k, top-p and min-p leave: freedave/logit_floor.h.
//
// A block owns a row and reads it some times over, which is in L2 after the first: up to 8 times for each of top-k and
// top-p where logits are bfloat16, 16 times where they are float32. A search knows between which two keys the floor
// lies; with each reading it adds up the weights above three keys between them, and a quarter of the keys is left.
// Nothing is shared but sums of integers, which come out the same in any order. Bound by instructions while much of the
// row lies between the two keys, then by reads.
#include "freedave/logit_floor.h"

#include "cuda/device.cuh"
#include "cuda/logit_groups.cuh"

namespace freedave::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSweep = kThreads * kGroup;
constexpr int kPivots = 3;

// A suppressed token sets the bit (token mod kMarks). Groups with a bit look into the list, which may be long.
constexpr int kMarks = 32768;

struct Scratch {
  uint32_t marks[kMarks / 32];
  int64_t sums[kWarps][kPivots];
  uint32_t largest[kWarps], least[kWarps];
};

// The low bits of a key that follow from the others: a logit of 16 bits has fewer than a float.
template <typename T>
constexpr int kRedundantBits = 0;
template <>
constexpr int kRedundantBits<BFloat16> = 16;
template <>
constexpr int kRedundantBits<Float16> = 13;

struct Span32 {
  uint32_t lowest, highest;
};

// A block's row.
template <typename T, bool kAligned>
class Row {
 public:
  __device__ Row(const LogitFloorParams& p, uint32_t row, Scratch& scratch)
      : p_(p), logits_(static_cast<const T*>(p.logits) + p.logit_rows.start(row)), scratch_(scratch) {}

  // `visit` sees the key of each candidate that this thread has, and that of a NaN.
  template <typename Visit>
  __device__ __forceinline__ void each(const Visit& visit) const {
    const int vocab = static_cast<int>(p_.vocab);
    for (int first = static_cast<int>(threadIdx.x) * kGroup; first < vocab; first += kSweep) {
      float x[kGroup];
      unpack(load_group<kAligned>(logits_, first, vocab), x);
      uint32_t hidden = 0;
      if (p_.num_suppress_tokens > 0 && (scratch_.marks[first % kMarks / 32] >> (first % 32) & 0xff) != 0) {
        hidden = suppressed_of(first);
      }
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const uint32_t key = key_of(x[i]);
        if (key >= kLeastCandidate && (hidden >> i & 1) == 0) visit(key);
      }
    }
  }

  // Sets the marks of the suppressed tokens.
  __device__ void mark_suppressed() const {
    if (p_.num_suppress_tokens == 0) return;
    for (int i = static_cast<int>(threadIdx.x); i < kMarks / 32; i += kThreads) scratch_.marks[i] = 0;
    __syncthreads();
    for (int64_t s = threadIdx.x; s < p_.num_suppress_tokens; s += kThreads) {
      const int64_t token = p_.suppress_tokens[s * p_.suppress_tokens_step];
      if (token < 0 || token >= p_.vocab) continue;
      atomicOr(&scratch_.marks[token % kMarks / 32], 1u << (token % 32));
    }
    __syncthreads();
  }

  // The largest key and the least one that is visited by `each` and passes; of all threads.
  template <typename Passes>
  __device__ Span32 span(const Passes& passes) const {
    uint32_t largest = 0, least = kNotANumber;
    each([&](uint32_t key) {
      if (!passes(key)) return;
      largest = key > largest ? key : largest;
      least = key < least ? key : least;
    });
    largest = __reduce_max_sync(kFullWarp, largest);
    least = __reduce_min_sync(kFullWarp, least);
    if (lane_id() == 0) {
      scratch_.largest[warp_id()] = largest;
      scratch_.least[warp_id()] = least;
    }
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) {
      largest = scratch_.largest[w] > largest ? scratch_.largest[w] : largest;
      least = scratch_.least[w] < least ? scratch_.least[w] : least;
    }
    __syncthreads();  // the next call uses the same scratch
    return {least, largest};
  }

  // Adds to `sums` the weights of the keys, without their redundant bits, above each pivot and not above `highest`.
  template <typename Weight>
  __device__ void add_above(const uint32_t (&pivot)[kPivots], uint32_t highest, const Weight& weight,
                            int64_t (&sums)[kPivots]) const {
    int64_t mine[kPivots] = {};
    each([&](uint32_t key) {
      const uint32_t part = key >> kRedundantBits<T>;
      if (part <= pivot[0] || part > highest) return;
      const int64_t weighs = weight(key);
#pragma unroll
      for (int j = 0; j < kPivots; ++j) mine[j] += part > pivot[j] ? weighs : 0;
    });
#pragma unroll
    for (int j = 0; j < kPivots; ++j) {
      mine[j] = warp_sum(mine[j]);
      if (lane_id() == 0) scratch_.sums[warp_id()][j] = mine[j];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kPivots; ++j) {
      for (int w = 0; w < kWarps; ++w) sums[j] += scratch_.sums[w][j];
    }
    __syncthreads();
  }

  // The least key from `lowest` to `highest`, without redundant bits, above which weights are less than `limit` of all
  // those not below `lowest`. None of them is above `highest`.
  template <typename Weight, typename Limit>
  __device__ uint32_t search(uint32_t lowest, uint32_t highest, const Weight& weight, const Limit& limit_of) const {
    int64_t all[kPivots] = {};
    add_above({lowest - 1, highest, highest}, highest, weight, all);
    const double limit = limit_of(all[0]);
    int64_t above = 0;  // `highest`
    while (lowest < highest) {
      const uint32_t width = highest - lowest;
      uint32_t pivot[kPivots];
      int64_t sums[kPivots];
#pragma unroll
      for (int j = 0; j < kPivots; ++j) {
        pivot[j] = lowest + static_cast<uint32_t>(static_cast<uint64_t>(width) * static_cast<uint32_t>(j + 1) / 4);
        sums[j] = above;
      }
      add_above(pivot, highest, weight, sums);
      // Between the last pivot above which there is too much, and the first above which there is not.
#pragma unroll
      for (int j = 0; j < kPivots; ++j) lowest = has_room(sums[j], limit) ? lowest : pivot[j] + 1;
#pragma unroll
      for (int j = kPivots - 1; j >= 0; --j) {
        const bool room = has_room(sums[j], limit);
        highest = room ? pivot[j] : highest;
        above = room ? sums[j] : above;
      }
    }
    return lowest;
  }

 private:
  // One bit for each token of a group.
  __device__ __forceinline__ uint32_t suppressed_of(int first) const {
    uint32_t bits = 0;
#pragma unroll 1
    for (int64_t s = 0; s < p_.num_suppress_tokens; ++s) {
      const int64_t place = p_.suppress_tokens[s * p_.suppress_tokens_step] - first;
      if (place >= 0 && place < kGroup) bits |= 1u << place;
    }
    return bits;
  }

  const LogitFloorParams& p_;
  const T* logits_;
  Scratch& scratch_;
};

// Blocks that an SM must have room for: with two, a thread has 64 registers, with which sm_120's compiler spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kBlocksPerSm = 1;
#else
constexpr int kBlocksPerSm = 2;
#endif

template <typename T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) find_floors(const __grid_constant__ LogitFloorParams p) {
  FREEDAVE_SHARED(Scratch, scratch);
  let_next_kernel_launch();
  wait_for_previous_kernel();
  const uint32_t row = blockIdx.x;
  if (!p.wants(row)) {
    if (threadIdx.x == 0) p.floor[row] = -INFINITY;
    return;
  }
  const Row<T, kAligned> keys(p, row, scratch);
  keys.mark_suppressed();
  const uint32_t largest = keys.span([](uint32_t) { return true; }).highest;
  const float scale = p.scale_at(row);
  if (!is_usable(largest, scale)) {
    if (threadIdx.x == 0) p.floor[row] = -INFINITY;
    return;
  }

  const Difference difference(largest, scale);
  const uint32_t highest = largest >> kRedundantBits<T>;
  uint32_t lowest = kLeastCandidate >> kRedundantBits<T>;
  if (p.top_k < p.vocab) {
    const auto one = [](uint32_t) { return int64_t{1}; };
    // Of fewer than k, all stay.
    const auto limit = [&](int64_t all) { return static_cast<double>(all < p.top_k ? all : p.top_k); };
    lowest = keys.search(lowest, highest, one, limit);
  }
  if (p.top_p < 1.0) {
    const auto weight = [&](uint32_t key) { return Weight(difference.of(key)).units(); };
    const auto limit = [&](int64_t all) { return static_cast<double>(all) * p.top_p; };
    lowest = keys.search(lowest, highest, weight, limit);
  }
  const Span32 stays = keys.span(
      [&](uint32_t key) { return key >> kRedundantBits<T> >= lowest && difference.of(key) >= p.least_difference; });
  // (With a NaN for min_p nothing passes.)
  if (threadIdx.x == 0) p.floor[row] = logit_of(stays.lowest < largest ? stays.lowest : largest);
}

template <typename T>
Error launch_rows(const LogitFloorParams& p, Stream stream) {
  const dim3 grid(static_cast<unsigned>(p.logit_rows.count));
  return is_aligned(p.logits, p.logit_rows, p.vocab, sizeof(T))
             ? launch_kernel(find_floors<T, true>, grid, kThreads, stream, p)
             : launch_kernel(find_floors<T, false>, grid, kThreads, stream, p);
}

}  // namespace

Error launch(const LogitFloorParams& p, Stream stream) {
  if (p.logit_rows.count == 0) return cudaSuccess;
  if (p.logit_rows.count > INT32_MAX) return cudaErrorInvalidValue;
  switch (p.logit_type) {
    case LogitType::kFloat32:
      return launch_rows<float>(p, stream);
    case LogitType::kBFloat16:
      return launch_rows<BFloat16>(p, stream);
    case LogitType::kFloat16:
      return launch_rows<Float16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace freedave::cuda
