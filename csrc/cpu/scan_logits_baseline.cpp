// scan_logits, 4 lanes: GCC and Clang vector extensions, so any CPU (SSE2 on x86-64, NEON on arm64).
#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#include <stdint.h>
#include <string.h>

#include "freedave/host_device.h"
#include "freedave/logit_types.h"

namespace freedave::cpu {
namespace {

struct Simd {
  typedef float Float __attribute__((vector_size(16)));
  typedef int32_t Mask __attribute__((vector_size(16)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  typedef uint64_t Wide __attribute__((vector_size(16)));
  struct Sum {
    double lane[4];
  };
  static constexpr int kLanes = 4;
  static constexpr int kFractionBits = 0;
  static constexpr float kExponentBias = 127.0f;

  static HD Float set(float x) { return Float{x, x, x, x}; }
  static HD void store(float* to, Float x) { memcpy(to, &x, sizeof(x)); }

  // Two vectors, in whatever order is cheapest: sums and maxima do not care.
  static HD void load(const float* x, Float& a, Float& b) {
    memcpy(&a, x, sizeof(a));
    memcpy(&b, x + 4, sizeof(b));
  }
  static HD void load(const BFloat16* x, Float& a, Float& b) {
    const Bits both = load_bits(x);
    a = reinterpret_cast<Float>(both << 16);
    b = reinterpret_cast<Float>(both & 0xffff0000u);
  }
  static HD void load(const Float16* x, Float& a, Float& b) {
    const Bits both = load_bits(x);
    a = from_half(both & 0xffffu);
    b = from_half(both >> 16);
  }
  template <typename T>
  static HD Bits load_bits(const T* x) {
    Bits bits;
    memcpy(&bits, x, sizeof(bits));
    return bits;
  }
  // As to_float(Float16), on four.
  static HD Float from_half(Bits half) {
    const Bits magnitude = half & 0x7fffu;
    const Bits sign = (half & 0x8000u) << 16;
    const Bits special = reinterpret_cast<Bits>(magnitude >= 0x7c00u);
    const Bits scaled = reinterpret_cast<Bits>(reinterpret_cast<Float>(magnitude << 13) * set(0x1p112f));
    return reinterpret_cast<Float>(sign | (special & (0x7f800000u | magnitude << 13)) | (~special & scaled));
  }

  static HD Float add(Float a, Float b) { return a + b; }
  static HD Float sub(Float a, Float b) { return a - b; }
  static HD Float mul(Float a, Float b) { return a * b; }
  static HD Float fma(Float a, Float b, Float c) { return a * b + c; }  // rounded twice
  // Either is b where a or b is NaN.
  static HD Float max(Float a, Float b) { return a > b ? a : b; }
  static HD Float min(Float a, Float b) { return a < b ? a : b; }
  static HD float reduce_max(Float a) {
    float top = a[0];
    for (int lane = 1; lane < kLanes; ++lane) top = a[lane] > top ? a[lane] : top;
    return top;
  }

  // ln 2 in two parts, the first short enough that n times it is exact.
  static HD Float subtract_ln2(Float d, Float n) { return (d - n * set(0.693359375f)) - n * set(-2.12194440e-4f); }
  // The low bits of y, an integer with the exponent's bias added, as an exponent.
  static HD Float power_of_two(Float y) { return reinterpret_cast<Float>(reinterpret_cast<Bits>(y) << 23); }

  static HD Mask equal(Float a, Float b) { return a == b; }
  static HD Mask at_least(Float a, Float b) { return a >= b; }
  static HD Float keep(Mask where, Float x) { return reinterpret_cast<Float>(where & reinterpret_cast<Mask>(x)); }
  static HD Float drop(Mask where, Float x) { return reinterpret_cast<Float>(~where & reinterpret_cast<Mask>(x)); }
  static HD bool any(Mask a, Mask b) {
    const Mask both = a | b;
    return (both[0] | both[1] | both[2] | both[3]) != 0;
  }
  static HD uint32_t bits(Mask a) {
    uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint32_t>(a[lane]) >> 31 << lane;
    return bits;
  }

  // 64-bit products of the low halves.
  static HD Wide multiply(Wide a, Wide b) {
#if defined(__SSE2__)  // for which compilers do not find the one instruction
    return reinterpret_cast<Wide>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
  }
  // Each high half in the place of the low one.
  static HD Wide high(Wide a) { return a >> 32; }
  // Whether a low half is at most `limit`.
  template <int N>
  static HD bool any_at_most(const Wide (&words)[N][4], uint32_t limit) {
    Mask reached{};
    for (const Wide(&of_lanes)[4] : words) {
      for (const Wide& x : of_lanes) reached |= reinterpret_cast<Bits>(x) <= limit;
    }
    const Wide low = reinterpret_cast<Wide>(reached) & 0xffffffffu;
    return (low[0] | low[1]) != 0;
  }
  // Which ones are, two bits an element.
  static HD uint32_t at_most(Wide words, uint32_t limit) {
    return static_cast<uint32_t>((words[0] & 0xffffffffu) <= limit) |
           static_cast<uint32_t>((words[1] & 0xffffffffu) <= limit) << 2;
  }

  static HD Sum zero_sum() { return {{0.0, 0.0, 0.0, 0.0}}; }
  static HD Sum accumulate(Sum sum, Float x) {
    for (int lane = 0; lane < kLanes; ++lane) sum.lane[lane] += static_cast<double>(x[lane]);
    return sum;
  }
  static HD double total(Sum sum) { return (sum.lane[0] + sum.lane[1]) + (sum.lane[2] + sum.lane[3]); }
};

}  // namespace
}  // namespace freedave::cpu

#include "cpu/scan_logits_simd.h"

freedave::cpu::ChunkKernel freedave::cpu::chunk_kernel_baseline(LogitType logit_type, Measure measure, bool drawn) {
  return chunk_kernel(logit_type, measure, drawn);
}
