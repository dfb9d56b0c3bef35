#pragma once
#include <stdint.h>
#include <string.h>

#include "freedave/host_device.h"

namespace freedave {

// Sampling without a state: the token of a position is arg max over v of x[v] / T + g(key, position, v), with Gumbel
// noise g from a counter. It decides integer results, so all backends must find the same bits: integers first, then a
// fixed sequence of float32 operations, each rounded on its own (the build allows no fused multiply-add, and no library
// logarithm is called).

// Four words of Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
struct Philox {
  static constexpr uint32_t kMultiplier[2] = {0xd2511f53u, 0xcd9e8d57u};
  static constexpr uint32_t kWeyl[2] = {0x9e3779b9u, 0xbb67ae85u};
  static constexpr int kRounds = 10;

  uint32_t word[4];

  HD Philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t key0, uint32_t key1) : word{c0, c1, c2, c3} {
    for (int round = 0; round < kRounds; ++round) {
      const uint64_t a = static_cast<uint64_t>(kMultiplier[0]) * word[0];
      const uint64_t b = static_cast<uint64_t>(kMultiplier[1]) * word[2];
      word[0] = static_cast<uint32_t>(b >> 32) ^ word[1] ^ key0;
      word[1] = static_cast<uint32_t>(b);
      word[2] = static_cast<uint32_t>(a >> 32) ^ word[3] ^ key1;
      word[3] = static_cast<uint32_t>(a);
      key0 += kWeyl[0];
      key1 += kWeyl[1];
    }
  }
};

// What the noise of a position depends on. One call of Philox serves four neighbouring tokens.
struct NoiseKey {
  uint64_t seed;
  uint64_t position;

  HD Philox words(int64_t quad) const {
    return Philox(static_cast<uint32_t>(quad), static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32),
                  0, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  }

  HD uint32_t word(int64_t token) const {
    const Philox four = words(token / 4);  // chosen from without an address: on a GPU they stay in registers
    const uint32_t low = token % 2 == 0 ? four.word[0] : four.word[1];
    const uint32_t high = token % 2 == 0 ? four.word[2] : four.word[3];
    return token % 4 < 2 ? low : high;
  }
};

HD int32_t bits_of(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

HD float float_of(int32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// A positive x is (1 + fraction) 2^exponent, the fraction in [-0.3, 0.42).
HD int32_t exponent_of(float x) { return (bits_of(x) - 0x3f3504f3) >> 23; }
HD float fraction_of(float x, int32_t exponent) { return float_of(bits_of(x) - (exponent << 23)) - 1.0f; }

// Its logarithm: log((1 + s) / (1 - s)) = 2 s + s^3 (2/3 + 2/5 s^2 + ...).
HD float log_of(float fraction, int32_t exponent) {
  constexpr float kLn2High = 0.693359375f;  // 10 bits: its product with an exponent is exact
  constexpr float kLn2Low = -2.12194440e-4f;
  const float s = fraction / (fraction + 2.0f);
  const float z = s * s;
  float series = static_cast<float>(2.0 / 9);
  series = series * z + static_cast<float>(2.0 / 7);
  series = series * z + static_cast<float>(2.0 / 5);
  series = series * z + static_cast<float>(2.0 / 3);
  const float scale = static_cast<float>(exponent);
  return scale * kLn2High + ((s + s) + ((s * z) * series + scale * kLn2Low));
}

// Gumbel noise of a word: -log(-log u), 1 - u being the upper 24 bits and a half, over 2^24. Error at most 1e-6.
HD float noise_of(uint32_t word) {
  constexpr float kMost = 1.0f - 0x1p-24f;
  const float w = (static_cast<float>(word >> 8) + 0.5f) * 0x1p-24f;
  const float v = w < kMost ? w : kMost;
  const float u = 1.0f - v;
  const int32_t u_exponent = exponent_of(u);
  // Near 1, u has lost digits that v has.
  const float exponential = -log_of(u_exponent == 0 ? -v : fraction_of(u, u_exponent), u_exponent);
  const int32_t exponent = exponent_of(exponential);
  return -log_of(fraction_of(exponential, exponent), exponent);
}

// No noise is further up or down than this.
inline constexpr float kLargestNoise = 17.329f;
inline constexpr float kLeastNoise = -2.812f;

// A token that may be the one: the larger noisy logit comes first, then the lower token.
struct NoisyChoice {
  float noisy;    // -INFINITY when there is none
  float logit;    // without its noise
  int64_t token;  // -1 when there is none
};

HD NoisyChoice no_choice() { return {-__builtin_inff(), -__builtin_inff(), -1}; }

HD bool comes_first(const NoisyChoice& a, const NoisyChoice& b) {
  return a.noisy > b.noisy || (a.noisy == b.noisy && a.token >= 0 && (b.token < 0 || a.token < b.token));
}

HD NoisyChoice first_of(const NoisyChoice& a, const NoisyChoice& b) {
  const bool first = comes_first(a, b);  // field by field, which takes no address: on a GPU all stay in registers
  return {first ? a.noisy : b.noisy, first ? a.logit : b.logit, first ? a.token : b.token};
}

}  // namespace freedave
