// scan_logits, 8 lanes: AVX2, FMA, F16C.
#include <immintrin.h>

#include "freedave/host_device.h"
#include "freedave/logit_types.h"

namespace freedave::cpu {
namespace {

struct Simd {
  using Float = __m256;
  using Mask = __m256;
  typedef uint64_t Wide __attribute__((vector_size(32)));
  struct Sum {
    __m256d low, high;
  };
  static constexpr int kLanes = 8;
  static constexpr int kFractionBits = 0;
  static constexpr float kExponentBias = 127.0f;

  static HD Float set(float x) { return _mm256_set1_ps(x); }
  static HD void store(float* to, Float x) { _mm256_storeu_ps(to, x); }

  // Two vectors, in whatever order is cheapest: sums and maxima do not care.
  static HD void load(const float* x, Float& a, Float& b) {
    a = _mm256_loadu_ps(x);
    b = _mm256_loadu_ps(x + 8);
  }
  static HD void load(const BFloat16* x, Float& a, Float& b) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    a = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    b = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static HD void load(const Float16* x, Float& a, Float& b) {
    a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 8)));
  }

  static HD Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static HD Float sub(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static HD Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static HD Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  // Either is b where a or b is NaN.
  static HD Float max(Float a, Float b) { return _mm256_max_ps(a, b); }
  static HD Float min(Float a, Float b) { return _mm256_min_ps(a, b); }
  static HD float reduce_max(Float a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    x = _mm_max_ss(x, _mm_movehdup_ps(x));
    return _mm_cvtss_f32(x);
  }

  static HD Float subtract_ln2(Float d, Float n) { return _mm256_fnmadd_ps(n, set(0.69314718055994531f), d); }
  // The low bits of y, an integer with the exponent's bias added, as an exponent.
  static HD Float power_of_two(Float y) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(y), 23)); }

  static HD Mask equal(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
  static HD Mask at_least(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
  static HD Float keep(Mask where, Float x) { return _mm256_and_ps(where, x); }
  static HD Float drop(Mask where, Float x) { return _mm256_andnot_ps(where, x); }
  static HD bool any(Mask a, Mask b) { return _mm256_movemask_ps(_mm256_or_ps(a, b)) != 0; }
  static HD uint32_t bits(Mask a) { return static_cast<uint32_t>(_mm256_movemask_ps(a)); }

  // 64-bit products of the low halves.
  static HD Wide multiply(Wide a, Wide b) {
    return reinterpret_cast<Wide>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
  }
  // Each high half in the place of the low one.
  static HD Wide high(Wide a) {
    return reinterpret_cast<Wide>(_mm256_shuffle_epi32(reinterpret_cast<__m256i>(a), 0xf5));
  }
  // Whether a low half is at most `limit`.
  template <int N>
  static HD bool any_at_most(const Wide (&words)[N][4], uint32_t limit) {
    __m256i least = reinterpret_cast<__m256i>(words[0][0]);
    for (const Wide(&of_lanes)[4] : words) {
      for (const Wide& x : of_lanes) least = _mm256_min_epu32(least, reinterpret_cast<__m256i>(x));
    }
    const __m256i reached = _mm256_min_epu32(least, _mm256_set1_epi32(static_cast<int>(limit)));
    return (_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(reached, least))) & 0x55) != 0;
  }
  // Which ones are, two bits an element.
  static HD uint32_t at_most(Wide words, uint32_t limit) {
    const __m256i x = reinterpret_cast<__m256i>(words);
    const __m256i reached = _mm256_min_epu32(x, _mm256_set1_epi32(static_cast<int>(limit)));
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(reached, x)))) & 0x55;
  }

  static HD Sum zero_sum() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
  static HD Sum accumulate(Sum sum, Float x) {
    return {_mm256_add_pd(sum.low, _mm256_cvtps_pd(_mm256_castps256_ps128(x))),
            _mm256_add_pd(sum.high, _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)))};
  }
  static HD double total(Sum sum) {
    const __m256d x = _mm256_add_pd(sum.low, sum.high);
    const __m128d y = _mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1));
    return _mm_cvtsd_f64(_mm_add_sd(y, _mm_unpackhi_pd(y, y)));
  }
};

}  // namespace
}  // namespace freedave::cpu

#include "cpu/scan_logits_simd.h"

freedave::cpu::ChunkKernel freedave::cpu::chunk_kernel_avx2(LogitType logit_type, Measure measure, bool drawn) {
  return chunk_kernel(logit_type, measure, drawn);
}
