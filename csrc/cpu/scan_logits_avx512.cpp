// scan_logits, 16 lanes: AVX-512 (F, BW, DQ, VL), FMA.
#include <immintrin.h>

#include "freedave/host_device.h"
#include "freedave/logit_types.h"

namespace freedave::cpu {
namespace {

// bits(2^(i/32)) - (i << 18)
alignas(64) constexpr int32_t kPowers[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3,
};

struct Simd {
  using Float = __m512;
  using Mask = __mmask16;
  typedef uint64_t Wide __attribute__((vector_size(64)));
  struct Sum {
    __m512d low, high;
  };
  static constexpr int kLanes = 16;
  static constexpr int kFractionBits = 5;
  static constexpr float kExponentBias = 0.0f;

  static HD Float set(float x) { return _mm512_set1_ps(x); }
  static HD void store(float* to, Float x) { _mm512_storeu_ps(to, x); }

  // Two vectors, in whatever order is cheapest: sums and maxima do not care.
  static HD void load(const float* x, Float& a, Float& b) {
    a = _mm512_loadu_ps(x);
    b = _mm512_loadu_ps(x + 16);
  }
  static HD void load(const BFloat16* x, Float& a, Float& b) {
    const __m512i both = _mm512_loadu_si512(x);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static HD void load(const Float16* x, Float& a, Float& b) {
    a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16)));
  }

  static HD Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static HD Float sub(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static HD Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static HD Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  // Either is b where a or b is NaN.
  static HD Float max(Float a, Float b) { return _mm512_max_ps(a, b); }
  static HD Float min(Float a, Float b) { return _mm512_min_ps(a, b); }
  static HD float reduce_max(Float a) { return _mm512_reduce_max_ps(a); }

  static HD Float subtract_ln2(Float d, Float n) { return _mm512_fnmadd_ps(n, set(0.69314718055994531f), d); }
  // The low bits of y, a number with five binary places. Its integer part goes into the exponent by a shift, which
  // leaves the fraction in the mantissa; the table of 2^(i/32), in two registers, has that subtracted and the bias in.
  static HD Float power_of_two(Float y) {
    const __m512i bits = _mm512_castps_si512(y);
    const __m512i fraction =
        _mm512_permutex2var_epi32(_mm512_load_si512(kPowers), bits, _mm512_load_si512(kPowers + 16));
    return _mm512_castsi512_ps(_mm512_add_epi32(fraction, _mm512_slli_epi32(bits, 18)));
  }

  static HD Mask equal(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
  static HD Mask at_least(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static HD Float keep(Mask where, Float x) { return _mm512_maskz_mov_ps(where, x); }
  static HD Float drop(Mask where, Float x) { return _mm512_maskz_mov_ps(_knot_mask16(where), x); }
  static HD bool any(Mask a, Mask b) { return (a | b) != 0; }
  static HD uint32_t bits(Mask a) { return a; }

  // 64-bit products of the low halves.
  static HD Wide multiply(Wide a, Wide b) {
    return reinterpret_cast<Wide>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
  }
  // Each high half in the place of the low one.
  static HD Wide high(Wide a) {
    return reinterpret_cast<Wide>(_mm512_shuffle_epi32(reinterpret_cast<__m512i>(a), _MM_PERM_DDBB));
  }
  // Whether a low half is at most `limit`.
  template <int N>
  static HD bool any_at_most(const Wide (&words)[N][4], uint32_t limit) {
    __m512i least = reinterpret_cast<__m512i>(words[0][0]);
    for (const Wide(&of_lanes)[4] : words) {
      for (const Wide& x : of_lanes) least = _mm512_min_epu32(least, reinterpret_cast<__m512i>(x));
    }
    return _mm512_mask_cmple_epu32_mask(0x5555, least, _mm512_set1_epi32(static_cast<int>(limit))) != 0;
  }
  // Which ones are, two bits an element.
  static HD uint32_t at_most(Wide words, uint32_t limit) {
    return _mm512_mask_cmple_epu32_mask(0x5555, reinterpret_cast<__m512i>(words),
                                        _mm512_set1_epi32(static_cast<int>(limit)));
  }

  static HD Sum zero_sum() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  static HD Sum accumulate(Sum sum, Float x) {
    return {_mm512_add_pd(sum.low, _mm512_cvtps_pd(_mm512_castps512_ps256(x))),
            _mm512_add_pd(sum.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)))};
  }
  static HD double total(Sum sum) { return _mm512_reduce_add_pd(_mm512_add_pd(sum.low, sum.high)); }
};

}  // namespace
}  // namespace freedave::cpu

#include "cpu/scan_logits_simd.h"

freedave::cpu::ChunkKernel freedave::cpu::chunk_kernel_avx512(LogitType logit_type, Measure measure, bool drawn) {
  return chunk_kernel(logit_type, measure, drawn);
}
