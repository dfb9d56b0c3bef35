// floor[i] = the least logit of row i that top-k, top-p and min-p leave: freedave/logit_floor.h.
//
// A thread owns a row. It makes keys of the logits once; a search then takes eight bits of the key a round, adds up the
// weights of the keys that agree so far by their next bits, and goes on with those among which the floor lies. Bound by
// instructions: some 10 an element for top-k, 40 for top-p.
#include "freedave/logit_floor.h"

#include <cmath>
#include <vector>

#include "cpu/parallel.h"

namespace freedave::cpu {
namespace {

using Keys = std::vector<uint32_t>;

constexpr int kDigits = 256;
constexpr int kBlock = 256;      // keys that are weighed together, in loops that compilers make vectors of
constexpr int kInterleaved = 4;  // sums beside each other: neighbours often have the same digit, and would wait

template <typename T>
void read_keys(const LogitFloorParams& p, int64_t row, Keys& keys) {
  const T* logits = static_cast<const T*>(p.logits) + p.logit_rows.start(row);
  keys.resize(p.vocab);
  for (int64_t v = 0; v < p.vocab; ++v) keys[v] = key_of(to_float(logits[v]));
  for (int64_t s = 0; s < p.num_suppress_tokens; ++s) {
    const int64_t token = p.suppress_tokens[s * p.suppress_tokens_step];
    if (token >= 0 && token < p.vocab) keys[token] = 0;
  }
}

void read_keys_of_type(const LogitFloorParams& p, int64_t row, Keys& keys) {
  switch (p.logit_type) {
    case LogitType::kFloat32:
      return read_keys<float>(p, row, keys);
    case LogitType::kBFloat16:
      return read_keys<BFloat16>(p, row, keys);
    case LogitType::kFloat16:
      return read_keys<Float16>(p, row, keys);
  }
}

// The weights of `count` keys by their digit at `shift`.
template <typename Weigh>
void add_by_digit(const uint32_t* keys, int64_t count, int shift, const Weigh& weigh, int64_t (&sums)[kDigits]) {
  int64_t partial[kInterleaved][kDigits] = {};
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int size = count - begin < kBlock ? static_cast<int>(count - begin) : kBlock;
    int64_t weights[kBlock];
    weigh(keys + begin, size, weights);
    for (int i = 0; i < size; ++i) {
      partial[i % kInterleaved][keys[begin + i] >> shift & (kDigits - 1)] += weights[i];
    }
  }
  for (int digit = 0; digit < kDigits; ++digit) {
    sums[digit] = 0;
    for (int n = 0; n < kInterleaved; ++n) sums[digit] += partial[n][digit];
  }
}

// The least key above which the others weigh less than `limit_of(weight of all)`, which is no more than that weight.
template <typename Weigh, typename Limit>
uint32_t search(const Keys& all_keys, const Weigh& weigh, const Limit& limit_of) {
  thread_local Keys left;
  left.resize(all_keys.size());
  const uint32_t* keys = all_keys.data();
  int64_t count = static_cast<int64_t>(all_keys.size()), above = 0;
  double limit = 0.0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t sums[kDigits];
    add_by_digit(keys, count, shift, weigh, sums);
    if (shift == 24) {
      int64_t all = 0;
      for (const int64_t each : sums) all += each;
      limit = limit_of(all);
    }
    uint32_t digit = kDigits - 1;
    while (digit > 0 && has_room(above + sums[digit], limit)) above += sums[digit--];
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      left[kept] = keys[i];
      kept += (keys[i] >> shift & (kDigits - 1)) == digit;
    }
    keys = left.data();
    count = kept;
  }
  return left.front();
}

// Leaves the keys from `least` on.
void keep_from(uint32_t least, Keys& keys) {
  size_t kept = 0;
  for (const uint32_t key : keys) {
    keys[kept] = key;
    kept += key >= least;
  }
  keys.resize(kept);
}

float floor_of(const LogitFloorParams& p, float scale, Keys& keys) {
  uint32_t largest = 0;
  for (const uint32_t key : keys) largest = key > largest ? key : largest;
  if (!is_usable(largest, scale)) return -INFINITY;
  const Difference difference(largest, scale);
  uint32_t lowest = kLeastCandidate;
  if (p.top_k < p.vocab) {
    const auto one = [&](const uint32_t* some, int size, int64_t* weights) {
      for (int i = 0; i < size; ++i) weights[i] = some[i] >= lowest ? 1 : 0;
    };
    // Of fewer than k, all stay.
    lowest = search(keys, one, [&](int64_t all) { return static_cast<double>(all < p.top_k ? all : p.top_k); });
    keep_from(lowest, keys);
  }
  if (p.top_p < 1.0) {
    const auto weigh = [&](const uint32_t* some, int size, int64_t* weights) {
      int32_t mantissa[kBlock], shift[kBlock];
      for (int i = 0; i < size; ++i) {
        const Weight weight(difference.of(some[i]));
        mantissa[i] = some[i] >= lowest ? weight.mantissa : 0;
        shift[i] = weight.shift;
      }
      for (int i = 0; i < size; ++i) weights[i] = (static_cast<int64_t>(mantissa[i]) << 10) >> shift[i];
    };
    lowest = search(keys, weigh, [&](int64_t all) { return static_cast<double>(all) * p.top_p; });
  }
  if (lowest > kLeastCandidate && p.least_difference == -INFINITY) return logit_of(lowest);  // one of the keys
  uint32_t least = largest;
  for (const uint32_t key : keys) {
    const bool stays = key >= lowest && difference.of(key) >= p.least_difference;
    least = stays && key < least ? key : least;
  }
  return logit_of(least);
}

}  // namespace

void launch(const LogitFloorParams& p, ParallelFor run) {
  parallel_for(run, p.logit_rows.count, grain_for(8 * p.vocab), [&](int64_t begin, int64_t end) {
    thread_local Keys keys;
    for (int64_t row = begin; row < end; ++row) {
      p.floor[row] = -INFINITY;
      if (!p.wants(row)) continue;
      read_keys_of_type(p, row, keys);
      p.floor[row] = floor_of(p, p.scale_at(row), keys);
    }
  });
}

}  // namespace freedave::cpu
