// floor[i] = the least logit of row i that top-k, top-p and min-p leave: freedave/logit_floor.h.
//
// A thread owns a row. It makes keys of the logits once; a search then takes eight bits of the key a round, adds up the
// weights of the keys that agree so far by their next bits, and goes on with those among which the floor lies.
#include "freedave/logit_floor.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/parallel.h"

namespace freedave::cpu {
namespace {

using Keys = std::vector<uint32_t>;

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

void keep_from(uint32_t least, Keys& keys) {
  keys.erase(std::remove_if(keys.begin(), keys.end(), [&](uint32_t key) { return key < least; }), keys.end());
}

// The least key above which the others weigh less than `limit(weight of all)`. Weights of all are more than that.
template <typename Weight, typename Limit>
uint32_t search(const Keys& keys, const Weight& weight, const Limit& limit_of) {
  thread_local Keys left;
  left = keys;
  double limit = 0.0;
  int64_t above = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t weights[256] = {};
    for (const uint32_t key : left) weights[key >> shift & 255] += weight(key);
    if (shift == 24) {
      int64_t all = 0;
      for (const int64_t each : weights) all += each;
      limit = limit_of(all);
    }
    uint32_t digit = 255;
    while (digit > 0 && has_room(above + weights[digit], limit)) above += weights[digit--];
    left.erase(std::remove_if(left.begin(), left.end(), [&](uint32_t key) { return (key >> shift & 255) != digit; }),
               left.end());
  }
  return left.front();
}

float floor_of(const LogitFloorParams& p, Keys& keys) {
  const uint32_t largest = *std::max_element(keys.begin(), keys.end());
  if (!is_usable(largest, p.inverse_temperature)) return -INFINITY;
  const Difference difference(largest, p.inverse_temperature);
  keep_from(kLeastCandidate, keys);
  if (p.top_k < static_cast<int64_t>(keys.size())) {
    const double limit = static_cast<double>(p.top_k);
    keep_from(search(keys, [](uint32_t) { return int64_t{1}; }, [&](int64_t) { return limit; }), keys);
  }
  if (p.top_p < 1.0) {
    const auto weight = [&](uint32_t key) { return weight_of(difference.of(key)); };
    keep_from(search(keys, weight, [&](int64_t all) { return static_cast<double>(all) * p.top_p; }), keys);
  }
  uint32_t least = largest;
  for (const uint32_t key : keys) {
    if (key < least && difference.of(key) >= p.least_difference) least = key;
  }
  return logit_of(least);
}

}  // namespace

void launch(const LogitFloorParams& p, ParallelFor run) {
  parallel_for(run, p.logit_rows.count, grain_for(8 * p.vocab), [&](int64_t begin, int64_t end) {
    thread_local Keys keys;
    for (int64_t row = begin; row < end; ++row) {
      p.floor[row] = -INFINITY;
      if (p.mask_index.data && !p.mask_index.at(row, 0)) continue;
      read_keys_of_type(p, row, keys);
      p.floor[row] = floor_of(p, keys);
    }
  });
}

}  // namespace freedave::cpu
