// Of a chunk of logits, the token with the largest noisy logit: freedave/sampling.h, for many tokens at once.
//
// Included once per instruction set, as scan_logits_simd.h is. Philox for four neighbours costs more than all else that
// is done with their logits, and the noise of each takes two logarithms. Few need either: noise is bounded, so a token
// far below the best one known loses, whatever its word, and noise is large where its word is small, so that a bound of
// some logits says which words might do. What is left out loses for certain: neither the order in which tokens are
// looked at nor what was known then shows in the result.
#include <stdint.h>
#include <string.h>

#include "cpu/scan_logits_chunk.h"
#include "freedave/host_device.h"
#include "freedave/logit_types.h"
#include "freedave/sampling.h"

namespace freedave::cpu {
namespace {

typedef uint32_t Words __attribute__((vector_size(4 * Simd::kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * Simd::kLanes)));
typedef float Floats __attribute__((vector_size(4 * Simd::kLanes)));

constexpr int kWide = Simd::kLanes / 2;    // 64-bit elements of a vector
constexpr int kStreams = 4;                // vectors of counters in flight: Philox waits for each of its products
constexpr int kQuads = kStreams * kWide;   // fours of neighbours whose words are found together
constexpr int kDrawn = 4 * kQuads;         // their tokens
constexpr int kListed = 4 * Simd::kLanes;  // tokens whose fours are listed together
static_assert(kTile % kDrawn == 0 && kDrawn % kListed == 0 && kListed <= 64);

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

// Words of some quads: word r of an element is that of the r-th of its four tokens. They lie in 64-bit elements, so
// that a product's halves lie where the next round needs them; only the low half of each counts. Each step is taken for
// all vectors before the next one, as they wait for their own products alone.
struct NoiseWords {
  using Wide = Simd::Wide;
  Wide c[kStreams][4];

  HD NoiseWords(const Wide (&quad)[kStreams], const PositionRounds& p) {
    Wide first[kStreams], second[kStreams], a[kStreams], b[kStreams];
    for (int j = 0; j < kStreams; ++j) first[j] = multiply(quad[j], 0);
    for (int j = 0; j < kStreams; ++j) second[j] = multiply(Simd::high(first[j]) ^ p.key1[0], 1);
    for (int j = 0; j < kStreams; ++j) a[j] = multiply(Simd::high(second[j]) ^ p.low1, 0);
    for (int j = 0; j < kStreams; ++j) b[j] = multiply(first[j] ^ p.high1, 1);
    for (int j = 0; j < kStreams; ++j) {
      c[j][0] = Simd::high(b[j]) ^ second[j] ^ p.key0[2];
      c[j][1] = b[j];
      c[j][2] = Simd::high(a[j]) ^ p.low2;
      c[j][3] = a[j];
    }
    for (int round = 3; round < Philox::kRounds; ++round) {
      for (int j = 0; j < kStreams; ++j) a[j] = multiply(c[j][0], 0);
      for (int j = 0; j < kStreams; ++j) b[j] = multiply(c[j][2], 1);
      for (int j = 0; j < kStreams; ++j) {
        c[j][0] = Simd::high(b[j]) ^ c[j][1] ^ p.key0[round];
        c[j][1] = b[j];
      }
      for (int j = 0; j < kStreams; ++j) {
        c[j][2] = Simd::high(a[j]) ^ c[j][3] ^ p.key1[round];
        c[j][3] = a[j];
      }
    }
  }

 private:
  static HD Wide multiply(Wide x, int which) { return Simd::multiply(x, Wide{} + Philox::kMultiplier[which]); }
};

// Not below the noise of the word: with w the uniform number, -log(-log(1 - w)) <= -log w, and the logarithm to base 2
// of a float is not below what its bits say as a fixed-point number. Two units of 1e-5 are lost in rounding.
HD float most_noise(uint32_t word) {
  constexpr float kLn2OfBits = 0.69314718f * 0x1p-23f;
  constexpr float kMost = 0.69314718f * (127 + 24) + 1e-4f;
  return kMost - kLn2OfBits * static_cast<float>(bits_of(static_cast<float>(word >> 8) + 0.5f));
}

// A token whose logit is `top` at most can reach `bar` only with a word of these or less. It is the same bound, turned
// around: w <= exp(top - bar), and 2^y is not above what y says as the bits of a float. What rounds up to `bar` is not
// below the number before it; 1e-4 in the exponent and 511 in the word make up for all other rounding.
HD void word_limits(const float (&top)[Simd::kLanes], float bar, uint32_t (&limit)[Simd::kLanes]) {
  constexpr float kLog2E = 1.44269504f, kUnit = 0x1p23f, kWord = 127 + 31, kMost = 0x1p31f - 128;
  const float before = bar - (bar < 0.0f ? -bar : bar) * 0x1p-23f;
  Floats y;
  memcpy(&y, top, sizeof(y));
  Simd::Float e = Simd::add(Simd::sub(reinterpret_cast<Simd::Float>(y), Simd::set(before)), Simd::set(1e-4f));
  e = Simd::min(Simd::max(e, Simd::set(-30.0f)), Simd::set(0.0f));  // NaN, which -inf less itself is, becomes -30
  const Simd::Float bits = Simd::mul(Simd::fma(e, Simd::set(kLog2E), Simd::set(kWord)), Simd::set(kUnit));
  const Integers power = __builtin_convertvector(reinterpret_cast<Floats>(bits), Integers);
  const Simd::Float least = Simd::min(reinterpret_cast<Simd::Float>(power), Simd::set(kMost));
  const Words half = reinterpret_cast<Words>(__builtin_convertvector(reinterpret_cast<Floats>(least), Integers));
  const Words words = half << 1 | 511u;
  memcpy(limit, &words, sizeof(words));
}

// What is known while tokens are looked at.
struct Draw {
  PositionRounds rounds;
  NoisyChoice best;
  float bar;              // what does worse loses: not below the best noisy logit
  Simd::Wide neighbours;  // 0, 1, 2...

  Draw(NoiseKey key, const NoisyChoice& best, float bar)
      : rounds(key), best(best), bar(best.noisy > bar ? best.noisy : bar) {
    for (int e = 0; e < kWide; ++e) neighbours[e] = static_cast<uint64_t>(e);
  }

  // The better of the best choice and the tokens with such words: logit_of(i) is that of token_of(i). Rarely called, so
  // not a part of the loops, which would run out of registers.
  template <typename TokenOf, typename LogitOf>
  __attribute__((noinline)) void choose(NoiseWords words, uint32_t limit, TokenOf token_of, LogitOf logit_of) {
    for (int j = 0; j < 4 * kStreams; ++j) {
      const Simd::Wide c = words.c[j / 4][j % 4];
      for (uint32_t low = Simd::at_most(c, limit); low != 0; low &= low - 1) {
        const int e = __builtin_ctz(low) / 2;
        const int i = 4 * (j / 4 * kWide + e) + j % 4;
        const float logit = logit_of(i);
        const uint32_t word = static_cast<uint32_t>(c[e]);
        if (!(logit + most_noise(word) >= bar)) continue;
        const NoisyChoice choice = {logit + noise_of(word), logit, token_of(i)};
        if (!comes_first(choice, best)) continue;
        best = choice;
        if (best.noisy > bar) bar = best.noisy;
      }
    }
  }
};

// Logits from `begin` on as floats divided by the temperature, what is suppressed or below the floor at -inf, and -inf
// behind them, up to a multiple of kDrawn.
template <typename T>
void scale(const Chunk& chunk, int64_t begin, int size, float* to) {
  const T* x = static_cast<const T*>(chunk.logits) + begin;
  const float floor = chunk.floor, by = chunk.scale;
  for (int i = 0; i < size; ++i) to[i] = to_float(x[i]) < floor ? -INFINITY : to_float(x[i]) * by;
  for (int i = size; i % kDrawn != 0; ++i) to[i] = -INFINITY;
  for (int64_t s = 0; s < chunk.num_suppressed; ++s) {
    const int64_t i = chunk.suppressed[s] - chunk.first_token - begin;
    if (i >= 0 && i < size) to[i] = -INFINITY;
  }
}

// One of them.
template <typename T>
float scaled(const Chunk& chunk, int64_t i) {
  if (i >= chunk.size) return -INFINITY;
  const float x = to_float(static_cast<const T*>(chunk.logits)[i]);
  bool out = x < chunk.floor;
  for (int64_t s = 0; s < chunk.num_suppressed; ++s) out |= chunk.suppressed[s] == chunk.first_token + i;
  return out ? -INFINITY : x * chunk.scale;
}

// Quads of tokens and their logits.
struct Quads {
  alignas(64) uint64_t quad[kQuads];
  alignas(64) float logits[kDrawn];
  int count = 0;
};

// Of kListed logits, the quads that have one which might win: the bit of each one's first token.
HD uint64_t quads_that_might(const float* logits, float bar) {
  Simd::Float x[4];
  Simd::load(logits, x[0], x[1]);
  Simd::load(logits + 2 * Simd::kLanes, x[2], x[3]);
  uint64_t might = 0;
  for (int j = 0; j < 4; ++j) {
    // Adding is monotone, so this is exact.
    const Simd::Mask reaches = Simd::at_least(Simd::add(x[j], Simd::set(kLargestNoise)), Simd::set(bar));
    might |= static_cast<uint64_t>(Simd::bits(reaches)) << (j * Simd::kLanes);
  }
  might |= might >> 1;
  return (might | might >> 2) & 0x1111111111111111u;
}

// The largest of kDrawn logits; a NaN is passed over, as what is suppressed may be one.
template <typename T>
HD float top_of(const T* logits) {
  Simd::Float top[2] = {Simd::set(-INFINITY), Simd::set(-INFINITY)};
  for (int i = 0; i < kDrawn; i += 2 * Simd::kLanes) {
    Simd::Float a, b;
    Simd::load(logits + i, a, b);
    top[0] = Simd::max(a, top[0]);
    top[1] = Simd::max(b, top[1]);
  }
  return Simd::reduce_max(Simd::max(top[0], top[1]));
}

// The quads listed so far, and none are left.
void draw_listed(Quads& listed, Draw& draw) {
  for (int i = 4 * listed.count; i < kDrawn; ++i) listed.logits[i] = -INFINITY;
  for (int i = listed.count; i < kQuads; ++i) listed.quad[i] = 0;
  listed.count = 0;
  float top[Simd::kLanes] = {top_of(listed.logits)};
  uint32_t limit[Simd::kLanes];
  word_limits(top, draw.bar, limit);
  Simd::Wide quad[kStreams];
  memcpy(quad, listed.quad, sizeof(quad));
  const NoiseWords words(quad, draw.rounds);
  if (!Simd::any_at_most(words.c, limit[0])) return;
  draw.choose(
      words, limit[0], [&](int i) { return static_cast<int64_t>(4 * listed.quad[i / 4]) + i % 4; },
      [&](int i) { return listed.logits[i]; });
}

// A tile of which few quads might win.
template <typename T>
void draw_few(const Chunk& chunk, int64_t begin, int size, Quads& listed, Draw& draw) {
  alignas(64) float logits[kTile];
  scale<T>(chunk, begin, size, logits);
  const uint64_t first_quad = static_cast<uint64_t>(chunk.first_token + begin) / 4;
  for (int first = 0; first < size; first += kListed) {
    for (uint64_t might = quads_that_might(logits + first, draw.bar); might != 0; might &= might - 1) {
      const int i = first + __builtin_ctzll(might);
      listed.quad[listed.count] = first_quad + static_cast<uint64_t>(i / 4);
      memcpy(listed.logits + 4 * listed.count, logits + i, 4 * sizeof(float));
      if (++listed.count == kQuads) draw_listed(listed, draw);
    }
  }
}

// kDrawn logits, and fewer where the chunk ends. No word above `limit` is low enough for the largest of them.
template <typename T>
HD void draw_all(const Chunk& chunk, int64_t begin, uint32_t limit, Draw& draw) {
  const uint64_t first_quad = static_cast<uint64_t>(chunk.first_token + begin) / 4;
  Simd::Wide quad[kStreams];
  for (int j = 0; j < kStreams; ++j) quad[j] = draw.neighbours + (first_quad + static_cast<uint64_t>(j * kWide));
  const NoiseWords words(quad, draw.rounds);
  if (!Simd::any_at_most(words.c, limit)) return;
  draw.choose(
      words, limit, [&](int i) { return chunk.first_token + begin + i; },
      [&](int i) { return scaled<T>(chunk, begin + i); });
}

// A tile of which many quads might win.
template <typename T>
void draw_many(const Chunk& chunk, int64_t begin, int size, Draw& draw) {
  const T* logits = static_cast<const T*>(chunk.logits) + begin;
  constexpr int kBatch = Simd::kLanes * kDrawn;
  for (int first = 0; first < size; first += kBatch) {
    const int blocks = (size - first < kBatch ? size - first : kBatch) / kDrawn;
    // Scaling is monotone. What is suppressed or below the floor counts here, which does no harm.
    float top[Simd::kLanes] = {};
    for (int i = 0; i < blocks; ++i) top[i] = top_of(logits + first + i * kDrawn) * chunk.scale;
    uint32_t limit[Simd::kLanes];
    word_limits(top, draw.bar, limit);
    for (int i = 0; i < blocks; ++i) {
      const float before = draw.bar;
      draw_all<T>(chunk, begin + first + i * kDrawn, limit[i], draw);
      if (draw.bar > before) word_limits(top, draw.bar, limit);
    }
  }
  if (size % kDrawn != 0) draw_all<T>(chunk, begin + size / kDrawn * kDrawn, ~0u, draw);
}

// Whether to look at all quads of a tile rather than to list those that might win: a list does not pay where more than
// a twelfth would be on it. The tile's first quads stand for all.
template <typename T>
bool many_might(const Chunk& chunk, int64_t begin, int size, float bar) {
  constexpr int kSample = 256;
  if (size < kSample) return false;
  alignas(64) float logits[kSample];
  scale<T>(chunk, begin, kSample, logits);
  int count = 0;
  for (int i = 0; i < kSample; i += kListed) count += __builtin_popcountll(quads_that_might(logits + i, bar));
  return count > kSample / 4 / 12;
}

template <typename T>
NoisyChoice draw_chunk(const Chunk& chunk, const NoisyChoice& best, float bar) {
  Draw draw(chunk.key, best, bar);
  Quads listed;
  for (int64_t begin = 0; begin < chunk.size; begin += kTile) {
    if (!(chunk.tops[begin / kTile] + kLargestNoise >= draw.bar)) continue;
    const int size = chunk.size - begin < kTile ? static_cast<int>(chunk.size - begin) : kTile;
    if (many_might<T>(chunk, begin, size, draw.bar)) {
      draw_many<T>(chunk, begin, size, draw);
    } else {
      draw_few<T>(chunk, begin, size, listed, draw);
    }
  }
  if (listed.count > 0) draw_listed(listed, draw);
  return draw.best;
}

}  // namespace
}  // namespace freedave::cpu
