// Of a tile of logits, the token with the largest noisy logit: freedave/sampling.h, for as many tokens as four vectors
// have.
//
// Included once per instruction set, as scan_logits_simd.h is. A token's noise takes two logarithms, which few need:
// noise is large where its word is small, so a block's largest logit says which words might do, and most blocks have
// none. In the others a bound of each token's noise comes from the bits of its uniform number alone, and only where
// that would do is the noise itself worked out.
#include <stdint.h>
#include <string.h>

#include "freedave/host_device.h"
#include "freedave/sampling.h"

namespace freedave::cpu {
namespace {

typedef uint32_t Words __attribute__((vector_size(4 * Simd::kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * Simd::kLanes)));
typedef float Floats __attribute__((vector_size(4 * Simd::kLanes)));

constexpr int kDrawn = 4 * Simd::kLanes;    // tokens of a block
constexpr int kLimited = 2 * Simd::kLanes;  // blocks whose limits are found together

// Which four neighbouring tokens a lane has, once they are transposed.
HD int64_t quad_of(int lane) { return lane % 4 * (Simd::kLanes / 4) + lane / 4; }

// Philox of one position. Only the first word of its counters tells tokens apart, so that until the third round some of
// the words are the same for all of them, and are worked out here.
struct PositionRounds {
  using Wide = Simd::Wide;
  Wide key0[Philox::kRounds], key1[Philox::kRounds];
  Wide low1, high1, low2;  // what is combined with the words that differ

  HD explicit PositionRounds(NoiseKey key) {
    constexpr uint64_t kLow = 0xffffffffu;
    const uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
    for (uint32_t round = 0; round < Philox::kRounds; ++round) {
      key0[round] = Wide{} + ((k0 + round * Philox::kWeyl[0]) & kLow);
      key1[round] = Wide{} + ((k1 + round * Philox::kWeyl[1]) & kLow);
    }
    const uint64_t b = Philox::kMultiplier[1] * (key.position >> 32);
    const uint64_t a = Philox::kMultiplier[0] * ((b >> 32) ^ (key.position & kLow) ^ k0);
    low1 = key0[1] ^ (b & kLow);
    high1 = key1[1] ^ (a >> 32);
    low2 = key1[2] ^ (a & kLow);
  }
};

// Words of a block: word r of a lane is that of the r-th of its four tokens. Even and odd lanes are apart, in 64-bit
// elements, so that a product's halves lie where the next round needs them; only the low half of each element counts.
struct NoiseWords {
  Simd::Wide c[2][4];

  HD NoiseWords(int64_t first_quad, const PositionRounds& p) {
    using Wide = Simd::Wide;
    for (int odd = 0; odd < 2; ++odd) {
      Wide quad{};
      for (int e = 0; e < Simd::kLanes / 2; ++e) quad[e] = static_cast<uint64_t>(quad_of(2 * e + odd));
      const Wide first = multiply(quad + static_cast<uint64_t>(first_quad), 0);
      const Wide second = multiply((first >> 32) ^ p.key1[0], 1);
      const Wide a = multiply((second >> 32) ^ p.low1, 0), b = multiply(first ^ p.high1, 1);
      c[odd][0] = (b >> 32) ^ second ^ p.key0[2];
      c[odd][1] = b;
      c[odd][2] = (a >> 32) ^ p.low2;
      c[odd][3] = a;
    }
    for (int round = 3; round < Philox::kRounds; ++round) {
      for (Wide(&x)[4] : c) {
        const Wide a = multiply(x[0], 0), b = multiply(x[2], 1);
        x[0] = (b >> 32) ^ x[1] ^ p.key0[round];
        x[1] = b;
        x[2] = (a >> 32) ^ x[3] ^ p.key1[round];
        x[3] = a;
      }
    }
  }

  HD Words word(int r) const { return reinterpret_cast<Words>((c[0][r] & 0xffffffffu) | (c[1][r] << 32)); }

 private:
  static HD Simd::Wide multiply(Simd::Wide x, int which) {
    return Simd::multiply(x, Simd::Wide{} + Philox::kMultiplier[which]);
  }
};

// Not below the noise of `words`: with w the uniform number, -log(-log(1 - w)) <= -log w, and the logarithm to base 2
// of a float is not below what its bits say as a fixed-point number. Two units of 1e-5 are lost in rounding.
HD Simd::Float most_noise(Words words) {
  constexpr float kLn2OfBits = 0.69314718f * 0x1p-23f;
  constexpr float kMost = 0.69314718f * (127 + 24) + 1e-4f;
  const Floats uniform = __builtin_convertvector(reinterpret_cast<Integers>(words >> 8), Floats) + 0.5f;
  const Floats bits = __builtin_convertvector(reinterpret_cast<Integers>(uniform), Floats);
  return Simd::fma(reinterpret_cast<Simd::Float>(bits), Simd::set(-kLn2OfBits), Simd::set(kMost));
}

// A token whose logit is `top` at most can do better than `best` only with a word of these or less. (Where it ties by
// rounding, it stands behind: blocks come in order.) It is the same bound, turned around: w <= exp(top - best), and 2^y
// is not above what y says as the bits of a float. 1e-4 in the exponent and 511 in the word make up for rounding.
HD void word_limits(const float* top, float best, uint32_t* limit) {
  constexpr float kLog2E = 1.44269504f, kUnit = 0x1p23f, kWord = 127 + 31, kMost = 0x1p31f - 128;
  Simd::Float y[2];
  Simd::load(top, y[0], y[1]);
  for (int j = 0; j < 2; ++j) {
    Simd::Float e = Simd::add(Simd::sub(y[j], Simd::set(best)), Simd::set(1e-4f));
    e = Simd::min(Simd::max(e, Simd::set(-30.0f)), Simd::set(0.0f));  // NaN, which -inf less itself is, becomes -30
    const Simd::Float bits = Simd::mul(Simd::fma(e, Simd::set(kLog2E), Simd::set(kWord)), Simd::set(kUnit));
    const Integers power = __builtin_convertvector(reinterpret_cast<Floats>(bits), Integers);
    const Simd::Float least = Simd::min(reinterpret_cast<Simd::Float>(power), Simd::set(kMost));
    const Words half = reinterpret_cast<Words>(__builtin_convertvector(reinterpret_cast<Floats>(least), Integers));
    const Words words = half << 1 | 511u;
    memcpy(limit + j * Simd::kLanes, &words, sizeof(words));
  }
}

// The better of `best` and a vector of tokens, of which `first` is the one in the first lane. Most hold bounds.
__attribute__((noinline)) void choose(const float* logits, const float* most, const uint32_t* words, int64_t first,
                                      NoisyChoice& best) {
  for (int lane = 0; lane < Simd::kLanes; ++lane) {
    if (!(most[lane] >= best.noisy)) continue;
    const NoisyChoice choice = {logits[lane] + noise_of(words[lane]), logits[lane], first + 4 * quad_of(lane)};
    if (choice.noisy > -INFINITY && comes_first(choice, best)) best = choice;
  }
}

// The better of `best` and the tokens of a tile, behind whose end there is -inf, up to a whole block.
HD void draw_token(const float* logits, int size, int64_t first_token, const PositionRounds& rounds,
                   NoisyChoice& best) {
  for (int first = 0; first < size; first += kLimited * kDrawn) {
    const int left = (size - first + kDrawn - 1) / kDrawn;
    const int blocks = left < kLimited ? left : kLimited;
    float top[kLimited];
    for (int block = 0; block < kLimited; ++block) {
      top[block] = -INFINITY;
      if (block >= blocks) continue;
      const float* x = logits + first + block * kDrawn;
      Simd::Float a, b, c, d;
      Simd::load(x, a, b);
      Simd::load(x + 2 * Simd::kLanes, c, d);
      top[block] = Simd::reduce_max(Simd::max(Simd::max(a, b), Simd::max(c, d)));
    }
    uint32_t limit[kLimited];
    word_limits(top, best.noisy, limit);
    for (int block = 0; block < blocks; ++block) {
      if (!(top[block] + kLargestNoise >= best.noisy)) continue;
      const int begin = first + block * kDrawn;
      const NoiseWords words((first_token + begin) / 4, rounds);
      if (!Simd::any_at_most(words.c, limit[block])) continue;
      Simd::Float x[4];
      Simd::load(logits + begin, x[0], x[1]);
      Simd::load(logits + begin + 2 * Simd::kLanes, x[2], x[3]);
      Simd::transpose(x);
      const float before = best.noisy;
      for (int r = 0; r < 4; ++r) {
        const Words word = words.word(r);
        const Simd::Float most = Simd::add(x[r], most_noise(word));
        const Simd::Mask may = Simd::at_least(most, Simd::set(best.noisy));
        if (!Simd::any(may, may)) continue;
        float logit[Simd::kLanes], bound[Simd::kLanes];
        uint32_t of_lane[Simd::kLanes];
        Simd::store(logit, x[r]);
        Simd::store(bound, most);
        memcpy(of_lane, &word, sizeof(word));
        choose(logit, bound, of_lane, first_token + begin + r, best);
      }
      if (best.noisy > before) word_limits(top, best.noisy, limit);
    }
  }
}

}  // namespace
}  // namespace freedave::cpu
