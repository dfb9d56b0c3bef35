#pragma once
// Eight neighbouring logits, as a thread loads them from any row of any type.
#include "cuda/device.cuh"
#include "freedave/rows.h"

namespace freedave::cuda {

constexpr int kGroup = 8;  // neighbouring logits that a thread loads together

// Two 16-bit logits, or one of 32 bits, as they lie in a word of memory.
template <typename T>
struct Word;

template <>
struct Word<float> {
  static constexpr uint32_t kMinusInfinity = 0xff800000u;
  __device__ static uint32_t of(const float* x, bool) {
    uint32_t word;
    memcpy(&word, x, sizeof(word));
    return word;
  }
  __device__ static void unpack(uint32_t word, float* x) { x[0] = float_from_bits(word); }
};

template <typename T>
struct HalfWord {
  // Element by element: the two need not be in one aligned word.
  __device__ static uint32_t of(const T* x, bool both) {
    const uint32_t high = both ? x[1].bits : Word<T>::kMinusInfinity >> 16;
    return high << 16 | x[0].bits;
  }
};

template <>
struct Word<BFloat16> : HalfWord<BFloat16> {
  static constexpr uint32_t kMinusInfinity = 0xff80ff80u;
  __device__ static void unpack(uint32_t word, float* x) {
    x[0] = float_from_bits(word << 16);
    x[1] = float_from_bits(word & 0xffff0000u);
  }
};

template <>
struct Word<Float16> : HalfWord<Float16> {
  static constexpr uint32_t kMinusInfinity = 0xfc00fc00u;
  __device__ static void unpack(uint32_t word, float* x) {
#if defined(__CUDA_ARCH__)
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(x[0]), "=f"(x[1])
        : "r"(word));
#else
    x[0] = to_float(Float16{static_cast<uint16_t>(word)});
    x[1] = to_float(Float16{static_cast<uint16_t>(word >> 16)});
#endif
  }
};

// Eight neighbouring logits, still packed.
template <typename T>
struct Group {
  static constexpr int kWords = kGroup * sizeof(T) / 4;
  static constexpr int kPerWord = kGroup / kWords;
  uint32_t word[kWords];
};

// The group at `first` of a chunk of `size` logits; what lies beyond is -inf. Only kAligned asks that every row starts
// at a 16-byte boundary and has whole groups; otherwise elements are loaded one by one, and the same bits come out.
template <bool kAligned, typename T>
__device__ __forceinline__ Group<T> load_group(const T* chunk, int first, int size) {
  Group<T> group;
#pragma unroll
  for (int w = 0; w < Group<T>::kWords; ++w) group.word[w] = Word<T>::kMinusInfinity;
  if constexpr (kAligned) {
    if (first < size) {
#pragma unroll
      for (int w = 0; w < Group<T>::kWords; w += 4) {
        const uint4 loaded = load_16_bytes(chunk + first + w * Group<T>::kPerWord);
        group.word[w] = loaded.x;
        group.word[w + 1] = loaded.y;
        group.word[w + 2] = loaded.z;
        group.word[w + 3] = loaded.w;
      }
    }
  } else {
#pragma unroll
    for (int w = 0; w < Group<T>::kWords; ++w) {
      const int at = first + w * Group<T>::kPerWord;
      if (at < size) group.word[w] = Word<T>::of(chunk + at, at + 1 < size);
    }
  }
  return group;
}

template <typename T>
__device__ __forceinline__ void unpack(const Group<T>& group, float (&x)[kGroup]) {
#pragma unroll
  for (int w = 0; w < Group<T>::kWords; ++w) Word<T>::unpack(group.word[w], x + w * Group<T>::kPerWord);
}

// Whether every row starts at a 16-byte boundary and has whole groups.
inline bool is_aligned(const void* logits, const Rows& rows, int64_t vocab, int64_t element_size) {
  const auto whole = [&](int64_t elements) { return elements * element_size % 16 == 0; };
  bool aligned = reinterpret_cast<uintptr_t>(logits) % 16 == 0 && vocab % kGroup == 0;
  for (int d = 0; d < rows.dims; ++d) aligned = aligned && whole(rows.stride[d]);
  return aligned;
}

}  // namespace freedave::cuda
