// One chunk of logits -> OnlineSoftmax: the largest logit and its lowest token, and sum exp(x - max).
//
// Included once per instruction set, after that file has defined `Simd` in its unnamed namespace. Everything here is in
// an unnamed namespace too, and nothing of the C++ library is used: an inline function compiled here for AVX-512 must
// never be the copy that the linker keeps for the others.
//
// The kernel reads memory once: a tile of logits that fits in L1 is summed relative to a reference, while tiles further
// on are fetched. For a probability the reference is the maximum so far and the tile's own maximum is found on the
// way; the other measures scan the tile for it first. The arg max is found afterwards by rescanning the one tile that
// held it, so the hot loops carry no indices. Sums run in float32 over at most 16 terms a lane, then in float64.
#include <math.h>
#include <string.h>

#include "cpu/draw_token_simd.h"
#include "cpu/scan_logits_chunk.h"
#include "freedave/logit_types.h"

namespace freedave::cpu {
namespace {

constexpr int kBlock = 4 * kTile;        // what is fetched while the block before it is read
constexpr int kPair = 2 * Simd::kLanes;  // elements a load yields
constexpr int kPairsPerGroup = 32;       // between two float64 accumulations: 16 terms a lane and accumulator
constexpr int kGroup = kPairsPerGroup * kPair;
static_assert(kTile % kGroup == 0);

// How far an element may lie above the reference of a scan: its term, e^16, is held as accurately as any.
constexpr float kSlack = 16.0f;

// The largest reference of a scan: further out, rounding to binary places would lose some of them.
constexpr float kFarReference = 1024.0f;

using Float = Simd::Float;

HD float negative_infinity(float) { return -INFINITY; }
HD BFloat16 negative_infinity(BFloat16) { return {0xff80}; }
HD Float16 negative_infinity(Float16) { return {0xfc00}; }

// Logits as a scan reads them: as they lie in memory or, where a token is drawn, divided by the temperature.
template <typename T, bool kIsDrawn>
struct Logits {
  const T* data;
  float scale;

  HD void load(int i, Float& a, Float& b) const {
    Simd::load(data + i, a, b);
    if constexpr (kIsDrawn) {
      a = Simd::mul(a, Simd::set(scale));
      b = Simd::mul(b, Simd::set(scale));
    }
  }
  HD float operator[](int i) const { return kIsDrawn ? to_float(data[i]) * scale : to_float(data[i]); }
};

// The functions that follow take N vectors, and take each step for all of them before the next step. Instructions that
// follow one another are then independent. One vector at a time would wait: a processor looks too few instructions
// ahead to find the next vector's.

// e^r for |r| <= ln 2 / 2 / 2^kFractionBits: a minimax polynomial that is exact at 0, of degree 2 for the table's short
// r, else 5.
template <int N>
HD void short_exp(Float (&r)[N]) {
  Float p[N];
  if constexpr (Simd::kFractionBits == 5) {
    for (int j = 0; j < N; ++j) p[j] = Simd::fma(r[j], Simd::set(0.5f), Simd::set(1.00001466f));
    for (int j = 0; j < N; ++j) r[j] = Simd::fma(p[j], r[j], Simd::set(1.0f));
  } else {
    constexpr float kPolynomial[] = {4.18979749e-2f, 1.66676372e-1f, 4.99991506e-1f, 9.99999702e-1f, 1.0f};
    for (int j = 0; j < N; ++j) p[j] = Simd::set(8.29030573e-3f);
    for (const float coefficient : kPolynomial) {
      for (int j = 0; j < N; ++j) p[j] = Simd::fma(p[j], r[j], Simd::set(coefficient));
    }
    for (int j = 0; j < N; ++j) r[j] = p[j];
  }
}

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718f;
// 1.5 * 2^23, scaled: adding it rounds to Simd::kFractionBits binary places, which become the low bits of the sum.
constexpr float kRound = 12582912.0f / (1 << Simd::kFractionBits) + Simd::kExponentBias;

// x = n ln 2 + r, where n has Simd::kFractionBits binary places: 2^(n + shift) into `power`, where `round` holds
// kRound + shift, an integer, and exp(r) into x, which is NaN for NaN. 2^(n + shift) is made of integers, with a table
// for the fraction where a register holds one. n + shift must be in [-127, 127], and |n| below 2^15.
template <int N>
HD void split_exp(Float (&x)[N], Float round, Float (&power)[N]) {
  Float n[N];
  for (int j = 0; j < N; ++j) power[j] = Simd::fma(x[j], Simd::set(kLog2E), round);
  for (int j = 0; j < N; ++j) n[j] = Simd::sub(power[j], round);
  for (int j = 0; j < N; ++j) power[j] = Simd::power_of_two(power[j]);
  for (int j = 0; j < N; ++j) x[j] = Simd::subtract_ln2(x[j], n[j]);
  short_exp(x);
}

template <int N>
HD void shifted_exp(Float (&x)[N], Float round) {
  Float power[N];
  split_exp(x, round, power);
  for (int j = 0; j < N; ++j) x[j] = Simd::mul(x[j], power[j]);
}

template <int N>
HD void add_shifted_exp(Float (&x)[N], Float round, Float* sum) {
  Float power[N];
  split_exp(x, round, power);
  for (int j = 0; j < N; ++j) sum[j] = Simd::fma(x[j], power[j], sum[j]);
}

// Terms are summed at 2^64 times their size: an entropy or log-odds may consist of some that float32 cannot hold.
constexpr int kScale = 64;
constexpr double kUnit = 0x1p-64;
constexpr float kScaledRound = kRound + kScale;

// 2^kScale exp(d) for d <= 0, with relative error below 2e-7 as long as terms of that size count beside exp(0), and
// below 5e-7 further down; 0 from lowest() down.
template <int N>
HD void exp_nonpositive(Float (&d)[N]) {
  shifted_exp(d, Simd::set(kScaledRound));
}

// Where the exponent's bits become 0. Further down they would wrap, so arguments are clamped here.
HD Float lowest() { return Simd::set(-kLn2 * (127 + kScale)); }

// What the terms of a scan are relative to. A term is 2^kScale exp(x) / 2^binade, where 2^binade is about
// exp(reference): that saves the subtraction of the reference from each element. Divided by `own`, the term of the
// reference itself, they are relative to it, and its own term is 1.
struct Reference {
  HD explicit Reference(float at) : value(at) {
    const float binade = rintf(at * kLog2E);
    round = Simd::set(kScaledRound - binade);
    lowest = Simd::set(kLn2 * (binade - 126.0f - kScale));
    Float term[1] = {Simd::set(at)};
    shifted_exp(term, round);
    float lanes[Simd::kLanes];
    Simd::store(lanes, term[0]);
    own = lanes[0];
  }

  float value, own;
  Float round;
  Float lowest;  // terms of what is less count as 2^-190, next to nothing beside any that is looked at
};

// a - b - fl(a - b), exactly.
HD Float rounding_of_difference(Float a, Float b, Float difference) {
  const Float minus_b = Simd::sub(difference, a);
  return Simd::sub(Simd::sub(a, Simd::sub(difference, minus_b)), Simd::add(b, minus_b));
}

// The largest element; a NaN is passed over here (the sum finds it).
template <typename T, bool kIsDrawn>
float tile_max(Logits<T, kIsDrawn> x, int size) {
  Float a = Simd::set(-INFINITY), b = a, c = a, d = a, u, v;
  int i = 0;
  for (; i + 2 * kPair <= size; i += 2 * kPair) {
    x.load(i, u, v);
    a = Simd::max(u, a);
    b = Simd::max(v, b);
    x.load(i + kPair, u, v);
    c = Simd::max(u, c);
    d = Simd::max(v, d);
  }
  for (; i < size; i += kPair) {
    x.load(i, u, v);
    a = Simd::max(u, a);
    b = Simd::max(v, b);
  }
  return Simd::reduce_max(Simd::max(Simd::max(a, b), Simd::max(c, d)));
}

struct TopTwo {
  float first, second;
};

HD TopTwo insert(TopTwo top, float x) {
  if (x > top.first) return {x, top.first};
  return {top.first, x > top.second ? x : top.second};
}

// The two largest elements, equal ones counted twice.
template <typename T, bool kIsDrawn>
TopTwo tile_top_two(Logits<T, kIsDrawn> x, int size) {
  Float first[2] = {Simd::set(-INFINITY), Simd::set(-INFINITY)};
  Float second[2] = {first[0], first[0]};
  for (int i = 0; i < size; i += kPair) {
    Float u[2];
    x.load(i, u[0], u[1]);
    for (int j = 0; j < 2; ++j) {
      second[j] = Simd::max(Simd::min(u[j], first[j]), second[j]);
      first[j] = Simd::max(u[j], first[j]);
    }
  }
  TopTwo top = {-INFINITY, -INFINITY};
  for (int j = 0; j < 2; ++j) {
    float a[Simd::kLanes], b[Simd::kLanes];
    Simd::store(a, first[j]);
    Simd::store(b, second[j]);
    for (int lane = 0; lane < Simd::kLanes; ++lane) top = insert(insert(top, a[lane]), b[lane]);
  }
  return top;
}

// Fetches the next block while this one is read: a few lines of each of its pages in turn. The prefetcher of an Intel
// core follows one stream of addresses in each page and never leaves the page. So eight pages at once are read up
// to 1.5 times as fast as one page after the other.
class Ahead {
 public:
  Ahead() = default;  // fetches nothing
  Ahead(const void* block, uint64_t bytes) {
    // A page belongs to the block that it begins in.
    const uint64_t address = reinterpret_cast<uintptr_t>(block);
    at_ = round_up(address);
    end_ = round_up(address + bytes);
    bytes_ = end_ - at_;
  }

  template <int kBytes>
  HD void fetch() {
    if (bytes_ == 0) return;
    constexpr uint64_t kStep = kBytes < kLine ? kLine : kBytes;
    for (uint64_t byte = 0; byte < kStep; byte += kLine) {
      __builtin_prefetch(reinterpret_cast<const void*>(static_cast<uintptr_t>(at_ + byte)));
    }
    at_ += kPage;
    if (at_ >= end_) at_ = at_ - bytes_ + kStep;
  }

 private:
  static constexpr uint64_t kLine = 64;
  static constexpr uint64_t kPage = 4096;
  static uint64_t round_up(uint64_t address) { return (address + kPage - 1) / kPage * kPage; }

  uint64_t at_ = 0;
  uint64_t end_ = 0;
  uint64_t bytes_ = 0;
};

// Hands the tile to `add`, four vectors at a time or two, and calls `end_group` before a lane has summed too many
// terms. Fetches as many bytes of the next block as it consumes of this tile.
template <typename T, bool kIsDrawn, typename Add, typename EndGroup>
HD void walk_tile(Logits<T, kIsDrawn> x, int size, Ahead& ahead, const Add& add, const EndGroup& end_group) {
  for (int begin = 0; begin < size; begin += kGroup) {
    const int end = begin + kGroup < size ? begin + kGroup : size;
    int i = begin;
    for (; i + 2 * kPair <= end; i += 2 * kPair) {
      ahead.fetch<2 * kPair * sizeof(T)>();
      Float u[4];
      x.load(i, u[0], u[1]);
      x.load(i + kPair, u[2], u[3]);
      add(u);
    }
    if (i < end) {
      Float u[2];
      x.load(i, u[0], u[1]);
      add(u);
    }
    end_group();
  }
}

// Four float32 accumulators a lane, emptied into float64 at the end of each group.
struct Terms {
  Float part[4] = {Simd::set(0.0f), Simd::set(0.0f), Simd::set(0.0f), Simd::set(0.0f)};
  Simd::Sum sum = Simd::zero_sum();

  HD void end_group() {
    sum = Simd::accumulate(sum, Simd::add(Simd::add(part[0], part[1]), Simd::add(part[2], part[3])));
    for (int j = 0; j < 4; ++j) part[j] = Simd::set(0.0f);
  }
};

// The tile's maximum and its terms relative to the reference, in one scan. Terms of elements above the reference exceed
// 1, which is harmless while they do so by little; the caller looks at the maximum.
template <typename T, bool kIsDrawn>
HD float scan_tile(Logits<T, kIsDrawn> x, int size, const Reference& reference, Ahead& ahead, double& terms) {
  const Float round = reference.round, lowest = reference.lowest;
  // Two accumulators: with more of them the loop would run out of registers.
  Float m[2] = {Simd::set(-INFINITY), Simd::set(-INFINITY)};
  Terms e;
  walk_tile(
      x, size, ahead,
      [&]<int N>(Float(&u)[N]) __attribute__((always_inline)) {
        for (int j = 0; j < N; ++j) m[j % 2] = Simd::max(u[j], m[j % 2]);
        for (int j = 0; j < N; ++j) u[j] = Simd::max(lowest, u[j]);
        add_shifted_exp(u, round, e.part);
      },
      [&]() __attribute__((always_inline)) { e.end_group(); });
  terms = Simd::total(e.sum) / static_cast<double>(reference.own);
  return Simd::reduce_max(Simd::max(m[0], m[1]));
}

// The sum of the tile's terms relative to `reference`, which no element exceeds.
template <typename T, bool kIsDrawn>
HD double sum_terms(Logits<T, kIsDrawn> x, int size, float reference, Ahead& ahead) {
  const Float top = Simd::set(reference);
  Terms e;
  walk_tile(
      x, size, ahead,
      [&]<int N>(Float(&u)[N]) __attribute__((always_inline)) {
        for (int j = 0; j < N; ++j) u[j] = Simd::max(lowest(), Simd::sub(u[j], top));
        add_shifted_exp(u, Simd::set(kScaledRound), e.part);
      },
      [&]() __attribute__((always_inline)) { e.end_group(); });
  return kUnit * Simd::total(e.sum);
}

// Adds the terms with what an entropy needs: terms weighted by their logits, and the largest ones counted apart.
template <typename T, bool kIsDrawn>
HD void add_entropy_terms(Logits<T, kIsDrawn> x, int size, float reference, Ahead& ahead, OnlineSoftmax& sum) {
  const Float top = Simd::set(reference);
  Terms e, w, t;
  walk_tile(
      x, size, ahead,
      [&]<int N>(Float(&u)[N]) __attribute__((always_inline)) {
        Float lost[N], power[N];
        Simd::Mask is_top[N];
        for (int j = 0; j < N; ++j) {
          // The largest terms only count. In a peaked row all others are far below them, where the subtraction rounds
          // off digits that matter; exp(d + lost) = exp(d) (1 + lost).
          const Float d = Simd::sub(u[j], top);
          is_top[j] = Simd::equal(u[j], top);
          const Simd::Mask counts = Simd::at_least(d, lowest());
          lost[j] = Simd::keep(counts, rounding_of_difference(u[j], top, d));
          power[j] = u[j] = Simd::max(lowest(), d);
        }
        exp_nonpositive(power);
        for (int j = 0; j < N; ++j) {
          const Float term = Simd::drop(is_top[j], Simd::fma(power[j], lost[j], power[j]));
          t.part[j] = Simd::add(t.part[j], Simd::keep(is_top[j], Simd::set(1.0f)));
          e.part[j] = Simd::add(e.part[j], term);
          w.part[j] = Simd::fma(term, u[j], w.part[j]);
        }
      },
      [&]() __attribute__((always_inline)) {
        e.end_group();
        w.end_group();
        t.end_group();
      });
  sum.rest += kUnit * Simd::total(e.sum);
  sum.weighted += kUnit * Simd::total(w.sum);
  sum.ties += Simd::total(t.sum);
}

// Offset of the first element equal to `value`, which the tile holds.
template <typename T, bool kIsDrawn>
int find(Logits<T, kIsDrawn> x, int size, float value) {
  const Float wanted = Simd::set(value);
  int i = 0;
  for (; i + kPair < size; i += kPair) {
    Float u, v;
    x.load(i, u, v);
    if (Simd::any(Simd::equal(u, wanted), Simd::equal(v, wanted))) break;
  }
  while (x[i] != value) ++i;
  return i;
}

// A tile as the loops need it: whole pairs of vectors, what is suppressed or below the floor at -inf. Only the end of a
// row and a tile with such tokens are copied, into `buffer`; all others are that already.
template <typename T, bool kIsDrawn>
const T* prepare_tile(const Chunk& chunk, int64_t begin, int size, T* buffer) {
  const T* x = static_cast<const T*>(chunk.logits) + begin;
  const int64_t first_token = chunk.first_token + begin;
  const bool has_floor = kIsDrawn && chunk.floor > -INFINITY;
  bool suppressed = false;
  for (int64_t s = 0; s < chunk.num_suppressed; ++s) {
    suppressed |= chunk.suppressed[s] >= first_token && chunk.suppressed[s] < first_token + size;
  }
  if (!suppressed && !has_floor && size % kPair == 0) return x;
  memcpy(buffer, x, size * sizeof(T));
  for (int i = 0; has_floor && i < size; ++i) {
    if (to_float(x[i]) < chunk.floor) buffer[i] = negative_infinity(T{});
  }
  for (int i = size; i % kPair != 0; ++i) buffer[i] = negative_infinity(T{});
  for (int64_t s = 0; suppressed && s < chunk.num_suppressed; ++s) {
    const int64_t i = chunk.suppressed[s] - first_token;
    if (i >= 0 && i < size) buffer[i] = negative_infinity(T{});
  }
  return buffer;
}

// The chunk's block at `begin`; after its last one, the first of what this thread reads next.
template <typename T>
Ahead next_block(const Chunk& chunk, int64_t begin) {
  const T* logits = static_cast<const T*>(chunk.logits);
  const bool within = begin < chunk.size;
  const int64_t left = within ? chunk.size - begin : chunk.next_size;
  // Where it is not known what comes next, this chunk is fetched again: it is in the cache, while the fetch of an
  // address that is not mapped takes a walk through the page tables.
  const void* block = within ? logits + begin : chunk.next ? chunk.next : logits;
  return Ahead(block, (left < kBlock ? left : kBlock) * sizeof(T));
}

template <typename T, Measure kMeasure, bool kIsDrawn>
OnlineSoftmax scan_chunk(const Chunk& chunk) {
  alignas(64) T buffer[kTile];
  const auto prepare = [&](int64_t begin, int size) {
    return Logits<T, kIsDrawn>{prepare_tile<T, kIsDrawn>(chunk, begin, size, buffer), chunk.scale};
  };
  OnlineSoftmax sum = empty_softmax();
  int64_t top_tile = -1;
  // Of the log-odds: the terms of that tile. They are not in `sum` while it leads; at the end it is summed once more,
  // without the chosen token, beside whose 1 the others were rounded.
  double top_terms = 0.0;
  Ahead ahead;
  Reference reference(0.0f);

  for (int64_t begin = 0; begin < chunk.size; begin += kTile) {
    if (chunk.fetch_ahead && begin % kBlock == 0) ahead = next_block<T>(chunk, begin + kBlock);
    const int size = chunk.size - begin < kTile ? static_cast<int>(chunk.size - begin) : kTile;
    const Logits<T, kIsDrawn> x = prepare(begin, size);
    const int padded = (size + kPair - 1) / kPair * kPair;

    // A probability needs only one scan: relative to the maximum so far, or to that of the first few elements.
    OnlineSoftmax tile = empty_softmax();
    if constexpr (!needs_second(kMeasure) && !needs_entropy_terms(kMeasure)) {
      const float guess = sum.token >= 0 ? sum.max : tile_max(x, padded < 2 * kPair ? padded : 2 * kPair);
      if (guess >= -kFarReference && guess <= kFarReference) {
        if (guess != reference.value) reference = Reference(guess);
        tile.max = scan_tile(x, padded, reference, ahead, tile.rest);
        if constexpr (kIsDrawn) chunk.tops[begin / kTile] = tile.max;
        if (sum.token >= 0 && tile.max <= guess) {  // the maximum stands, and the terms are relative to it already
          sum.rest += tile.rest;
          continue;
        }
        if (tile.max <= guess + kSlack) {
          tile.token = chunk.first_token + begin;
          tile.rest *= exp(static_cast<double>(guess) - static_cast<double>(tile.max));
          if constexpr (needs_others(kMeasure)) {
            sum.rest += top_terms;
            top_terms = tile.rest;
            tile.rest = 0.0;
          }
          sum = merge(sum, tile);
          top_tile = begin;
          continue;
        }
        tile = empty_softmax();
      }
    }

    // The tile's maximum; terms summed so far move to the new one.
    if constexpr (needs_second(kMeasure)) {
      const TopTwo top = tile_top_two(x, padded);
      tile.max = top.first;
      tile.second = top.second;
    } else {
      tile.max = tile_max(x, padded);
      if constexpr (kIsDrawn) chunk.tops[begin / kTile] = tile.max;
    }
    if (tile.max > -INFINITY) tile.token = chunk.first_token + begin;
    const bool leads = tile.token >= 0 && (sum.token < 0 || tile.max > sum.max);
    if (needs_others(kMeasure) && leads) sum.rest += top_terms;
    sum = merge(sum, tile);
    if (leads) top_tile = begin;

    const float reference = sum.token >= 0 ? sum.max : 0.0f;
    if constexpr (needs_entropy_terms(kMeasure)) {
      add_entropy_terms(x, padded, reference, ahead, sum);
    } else {
      const double terms = sum_terms(x, padded, reference, ahead);
      if (needs_others(kMeasure) && leads) {
        top_terms = terms;
      } else {
        sum.rest += terms;
      }
    }
  }

  if (top_tile >= 0) {
    const int size = chunk.size - top_tile < kTile ? static_cast<int>(chunk.size - top_tile) : kTile;
    const int padded = (size + kPair - 1) / kPair * kPair;
    const Logits<T, kIsDrawn> x = prepare(top_tile, size);
    const int place = find(x, padded, sum.max);
    sum.token = chunk.first_token + top_tile + place;
    if constexpr (needs_others(kMeasure)) {
      if (x.data != buffer) memcpy(buffer, x.data, padded * sizeof(T));
      buffer[place] = negative_infinity(T{});
      Ahead nothing;
      sum.ties = 1.0;
      sum.rest += sum_terms(Logits<T, kIsDrawn>{buffer, x.scale}, padded, sum.max, nothing);
    }
  }
  if constexpr (kIsDrawn) {
    const float noisy = chunk.draws ? sum.max + noise_of(chunk.key.word(sum.token)) : sum.max;
    const NoisyChoice top = {noisy, sum.max, sum.token};
    set_choice(sum, sum.token >= 0 ? top : no_choice());
  }
  return sum;
}

template <typename T, Measure kMeasure>
ChunkKernel chunk_kernel(bool drawn) {
  if constexpr (measures_draws(kMeasure)) {
    if (drawn) return {scan_chunk<T, kMeasure, true>, draw_chunk<T>};
  }
  return {drawn ? nullptr : scan_chunk<T, kMeasure, false>, nullptr};
}

template <typename T>
ChunkKernel chunk_kernel(Measure measure, bool drawn) {
  switch (measure) {
    case Measure::kProb:
      return chunk_kernel<T, Measure::kProb>(drawn);
    case Measure::kMargin:
      return chunk_kernel<T, Measure::kMargin>(drawn);
    case Measure::kNegEntropy:
      return chunk_kernel<T, Measure::kNegEntropy>(drawn);
    case Measure::kLogOdds:
      return chunk_kernel<T, Measure::kLogOdds>(drawn);
  }
  return {};
}

ChunkKernel chunk_kernel(LogitType logit_type, Measure measure, bool drawn) {
  switch (logit_type) {
    case LogitType::kFloat32:
      return chunk_kernel<float>(measure, drawn);
    case LogitType::kBFloat16:
      return chunk_kernel<BFloat16>(measure, drawn);
    case LogitType::kFloat16:
      return chunk_kernel<Float16>(measure, drawn);
  }
  return {};
}

}  // namespace
}  // namespace freedave::cpu
