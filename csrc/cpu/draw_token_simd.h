// Of a tile of logits, the token with the largest noisy logit: freedave/sampling.h, for as many tokens as four vectors
// have.
//
// Included once per instruction set, as scan_logits_simd.h is. A token's noise takes two logarithms, which few need: a
// bound of it comes from the bits of its uniform number alone, and only where that would do is the noise itself worked
// out.
#include <stdint.h>
#include <string.h>

#include "freedave/host_device.h"
#include "freedave/sampling.h"

namespace freedave::cpu {
namespace {

typedef uint32_t Words __attribute__((vector_size(4 * Simd::kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * Simd::kLanes)));
typedef float Floats __attribute__((vector_size(4 * Simd::kLanes)));

constexpr int kDrawn = 4 * Simd::kLanes;  // tokens at a time

// Which four neighbouring tokens a lane has, once they are transposed.
HD int64_t quad_of(int lane) { return lane % 4 * (Simd::kLanes / 4) + lane / 4; }

// Philox of all lanes: word r of a lane is that of the r-th of its four tokens. Even and odd lanes are apart, in 64-bit
// elements, so that a product's halves lie where the next round needs them; it reads the low half of each element only.
HD void noise_words(int64_t first_quad, NoiseKey key, Words (&words)[4]) {
  using Wide = Simd::Wide;
  constexpr uint64_t kLow = 0xffffffffu;
  Wide c[2][4] = {};
  for (int odd = 0; odd < 2; ++odd) {
    Wide quad{};
    for (int e = 0; e < Simd::kLanes / 2; ++e) quad[e] = static_cast<uint64_t>(quad_of(2 * e + odd));
    c[odd][0] = quad + static_cast<uint64_t>(first_quad);
    c[odd][1] = Wide{} + (key.position & kLow);
    c[odd][2] = Wide{} + (key.position >> 32);
  }
  uint32_t key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < Philox::kRounds; ++round) {
    for (Wide(&x)[4] : c) {
      const Wide a = Simd::multiply(x[0], Wide{} + Philox::kMultiplier[0]);
      const Wide b = Simd::multiply(x[2], Wide{} + Philox::kMultiplier[1]);
      x[0] = (b >> 32) ^ x[1] ^ key0;
      x[1] = b;
      x[2] = (a >> 32) ^ x[3] ^ key1;
      x[3] = a;
    }
    key0 += Philox::kWeyl[0];
    key1 += Philox::kWeyl[1];
  }
  for (int r = 0; r < 4; ++r) words[r] = reinterpret_cast<Words>((c[0][r] & kLow) | (c[1][r] << 32));
}

// Not below the noise of `words`: with w the uniform number, -log(-log(1 - w)) <= -log w, and the logarithm to base 2
// of a float is not below what its bits say as a fixed-point number. Two units of 1e-5 are lost in rounding.
HD Simd::Float most_noise(Words words) {
  constexpr float kLn2OfBits = 0.69314718f * 0x1p-23f;
  constexpr float kMost = 0.69314718f * (127 + 24) + 1e-4f;
  const Floats uniform = __builtin_convertvector(reinterpret_cast<Integers>(words >> 8), Floats) + 0.5f;
  const Floats bits = __builtin_convertvector(reinterpret_cast<Integers>(uniform), Floats);
  return Simd::fma(reinterpret_cast<Simd::Float>(bits), Simd::set(-kLn2OfBits), Simd::set(kMost));
}

// The better of `best` and the tokens of a tile, which is whole units of kDrawn: beyond its end there is -inf.
HD void draw_token(const float* logits, int size, int64_t first_token, NoiseKey key, NoisyChoice& best) {
  for (int begin = 0; begin < size; begin += kDrawn) {
    Simd::Float x[4];
    Simd::load(logits + begin, x[0], x[1]);
    Simd::load(logits + begin + 2 * Simd::kLanes, x[2], x[3]);
    const Simd::Float top = Simd::max(Simd::max(x[0], x[1]), Simd::max(x[2], x[3]));
    const Simd::Mask reaches = Simd::at_least(Simd::add(top, Simd::set(kLargestNoise)), Simd::set(best.noisy));
    if (!Simd::any(reaches, reaches)) continue;

    Words words[4];
    noise_words((first_token + begin) / 4, key, words);
    Simd::transpose(x);
    Simd::Float most[4];
    Simd::Mask may[4];
    for (int r = 0; r < 4; ++r) {
      most[r] = Simd::add(x[r], most_noise(words[r]));
      may[r] = Simd::at_least(most[r], Simd::set(best.noisy));
    }
    if (!Simd::any(may[0], may[1]) && !Simd::any(may[2], may[3])) continue;
    for (int r = 0; r < 4; ++r) {
      float logit[Simd::kLanes], at_most[Simd::kLanes];
      uint32_t word[Simd::kLanes];
      Simd::store(logit, x[r]);
      Simd::store(at_most, most[r]);
      memcpy(word, &words[r], sizeof(word));
      for (int lane = 0; lane < Simd::kLanes; ++lane) {
        if (!(at_most[lane] >= best.noisy)) continue;
        const NoisyChoice choice = {logit[lane] + noise_of(word[lane]), logit[lane],
                                    first_token + begin + 4 * quad_of(lane) + r};
        if (choice.noisy > -INFINITY && comes_first(choice, best)) best = choice;
      }
    }
  }
}

}  // namespace
}  // namespace freedave::cpu
