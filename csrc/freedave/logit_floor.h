#pragma once
#include <cstdint>

#include "freedave/launch.h"
#include "freedave/logit_types.h"
#include "freedave/rows.h"
#include "freedave/sampling.h"

namespace freedave {

// The least logit of each row [*, V] that top-k, top-p and min-p leave.
struct LogitFloorParams {
  const void* logits;
  Rows logit_rows;  // over [*]
  LogitType logit_type;
  int64_t vocab;                  // V, at most kMostSummedTokens
  Matrix<const bool> mask_index;  // [*], a row of length 1 each; data is null: every row is read
  const int64_t* suppress_tokens;
  int64_t num_suppress_tokens, suppress_tokens_step;
  Matrix<const float> temperature;  // [*] likewise; data is null: 1. Where it is 0, nothing is drawn, and all may stay
  int64_t top_k;                    // at least 1; V or more leaves all
  double top_p;                     // 1 leaves all
  float least_difference;           // log(min_p); -inf leaves all
  float* floor;                     // contiguous [*]

  HD bool wants(int64_t row) const {
    return (!mask_index.data || mask_index.at(row, 0)) && (!temperature.data || temperature.at(row, 0) > 0.0f);
  }
  HD float scale_at(int64_t row) const { return temperature.data ? 1.0f / temperature.at(row, 0) : 1.0f; }
};

// So many weights of at most 2^40 have a sum of 63 bits.
inline constexpr int64_t kMostSummedTokens = (int64_t{1} << 23) - 1;

// Top-k and top-p are one search. Each candidate has a weight, an integer: 1, or its probability. The floor is the
// least candidate above which the others together weigh less than a limit: k, or top_p of all. Sums of integers do not
// depend on their order, and the search goes over keys, the integers that order as logits do.

inline constexpr uint32_t kLeastCandidate = 0x00800000u;  // the key of -FLT_MAX; what is suppressed has 0
inline constexpr uint32_t kNotANumber = 0xffffffffu;

HD uint32_t key_of(float logit) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(logit + 0.0f));  // -0.0 and 0.0 are equal logits
  const uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return logit != logit ? kNotANumber : key;
}

HD float logit_of(uint32_t key) { return float_from_bits(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

// Whether a row with this largest key can be predicted: it is a number, and finite divided by the temperature.
HD bool is_usable(uint32_t largest, float scale) {
  if (largest < kLeastCandidate || largest == kNotANumber) return false;
  const float scaled = logit_of(largest) * scale;
  return scaled - scaled == 0.0f;
}

// exp(difference) for what is at most 0, as a whole number of 2^-40, rounded down: mantissa 2^10 >> shift. Float
// operations are rounded each on its own, as those of the noise in sampling.h, so that all backends find the same
// integers.
struct Weight {
  int32_t mantissa, shift;

  HD explicit Weight(float difference) {
    constexpr float kLog2E = 1.44269504088896341f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
    constexpr float kToWhole = 12582912.0f;    // 1.5 * 2^23: adding it rounds
    const bool counts = difference >= -28.0f;  // further down it is less than a unit
    const float d = counts ? difference : 0.0f;
    const float whole = (d * kLog2E + kToWhole) - kToWhole;
    const float r = (d - whole * kLn2High) - whole * kLn2Low;
    float series = static_cast<float>(1.0 / 720);
    series = series * r + static_cast<float>(1.0 / 120);
    series = series * r + static_cast<float>(1.0 / 24);
    series = series * r + static_cast<float>(1.0 / 6);
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    const int32_t scaled = static_cast<int32_t>(series * 0x1p30f);
    mantissa = counts ? scaled : 0;
    shift = -static_cast<int32_t>(whole);
  }

  HD int64_t units() const { return (static_cast<int64_t>(mantissa) << 10) >> shift; }
};

// Of a candidate, relative to the largest, both divided by the temperature.
struct Difference {
  float largest, scale;
  HD Difference(uint32_t largest_key, float scale) : largest(logit_of(largest_key) * scale), scale(scale) {}
  HD float of(uint32_t key) const { return logit_of(key) * scale - largest; }
};

// Whether what weighs `above` in all leaves room for a token below.
HD bool has_room(int64_t above, double limit) { return static_cast<double>(above) < limit; }

namespace cpu {
void launch(const LogitFloorParams& p, ParallelFor run);
}

namespace cuda {
Error launch(const LogitFloorParams& p, Stream stream);  // one kernel
}

}  // namespace freedave
