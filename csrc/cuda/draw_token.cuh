#pragma once
// Of the logits of a block, the token with the largest noisy logit: freedave/sampling.h.
//
// Philox for four neighbours, a quad, costs as much as all else that is done with their logits, and the noise of one
// token costs more than both. Few tokens need the noise: it is large where the word is small, so the smallest word of a
// quad and its largest logit bound what its tokens come to. Noise is bounded, so where all logits are far below what
// was found, nothing needs Philox. What is left out loses for certain: neither the order in which tokens are looked at
// nor what was known then shows in the result.
#include "cuda/device.cuh"
#include "freedave/sampling.h"

namespace freedave::cuda {

constexpr int kQuad = 4;  // neighbouring tokens that have one counter

// The largest number; a NaN is passed over.
template <int kCount>
__device__ __forceinline__ float largest_of(const float (&x)[kCount]) {
  float largest = x[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) largest = fmaxf(largest, x[i]);
  return largest;
}

__device__ __forceinline__ float largest_of_quad(const float* x) { return fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3])); }

// Where `largest` stands in x, which has -inf there from now on.
template <int kCount>
__device__ __forceinline__ int take(float largest, float (&x)[kCount]) {
  int place = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) place = x[i] == largest ? i : place;
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = i == place ? -INFINITY : x[i];
  return place;
}

// No token whose logit is at most this one and whose word is at least this one has a larger noisy logit: with w the
// uniform number, noise is at most -log w. Here w lacks its last bit; what rounding takes away is left to `bar_below`.
__device__ __forceinline__ float most_noisy(float logit, uint32_t word) {
  const float w = float_from_bits(word >> 9 | 0x3f800000u) - 1.0f;
  return fmaf(log2_flushed(w), -0.693147181f, logit);
}

__device__ __forceinline__ uint32_t smallest_word(const Philox& noise) {
  const uint32_t a = noise.word[0] < noise.word[1] ? noise.word[0] : noise.word[1];
  const uint32_t b = noise.word[2] < noise.word[3] ? noise.word[2] : noise.word[3];
  return a < b ? a : b;
}

// A token that cannot reach this loses against `noisy`. Noisy logits are rounded to their own precision, and
// bounds are too low by 2e-5 at most.
__device__ __forceinline__ float bar_below(float noisy) { return noisy - (fabsf(noisy) * 0x1p-22f + 1e-4f); }

// Integers that order as numbers do, and back.
__device__ __forceinline__ int32_t ordered(int32_t bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

// What a thread knows of the token that is drawn.
class Drawn {
 public:
  // The bar of the threads of a block, the bits of a number.
  static constexpr int32_t kLowestBar = static_cast<int32_t>(0xff7fffffu);  // -FLT_MAX
  static constexpr int32_t kNoToken = 0x7f800000;                           // infinity, which nothing reaches

  NoisyChoice choice = no_choice();

  __device__ bool may_win(float most) const { return most >= bar_; }

  // Four neighbouring tokens from `first` on, whose logits are `x`.
  __device__ void consider(const float (&x)[kQuad], int64_t first, const NoiseKey& key) {
    const Philox noise = key.words(first / kQuad);
    float most[kQuad];
#pragma unroll
    for (int r = 0; r < kQuad; ++r) most[r] = most_noisy(x[r], noise.word[r]);
#pragma unroll 1
    for (float best = largest_of(most); may_win(best); best = largest_of(most)) {
      const int chosen = take(best, most);
      float logit = x[0];
      uint32_t word = noise.word[0];
#pragma unroll
      for (int r = 1; r < kQuad; ++r) {
        logit = r == chosen ? x[r] : logit;
        word = r == chosen ? noise.word[r] : word;
      }
      const NoisyChoice one = {logit + noise_of(word), logit, first + chosen};
      choice = first_of(one, choice);
      bar_ = fmaxf(bar_, bar_below(one.noisy));
    }
  }

  // What any thread of the block has found is the bar of all. All threads of a warp call these.
  __device__ void share(int32_t& block_bar) {
    const int32_t bar = ordered(__reduce_max_sync(kFullWarp, ordered(bits_of(bar_))));
    // Bits order as the numbers do, but those of negative ones backwards, and as unsigned integers above all others.
    if (lane_id() == 0 && bar >= 0) atomicMax(&block_bar, bar);
    if (lane_id() == 0 && bar < 0) atomicMin(reinterpret_cast<uint32_t*>(&block_bar), static_cast<uint32_t>(bar));
    __syncwarp();
    hear(block_bar);
  }
  __device__ void hear(const int32_t& block_bar) { bar_ = float_of(load_shared_now(block_bar)); }

 private:
  float bar_ = -FLT_MAX;  // what is below loses
};

}  // namespace freedave::cuda
