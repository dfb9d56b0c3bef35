#pragma once
#include <stdint.h>
#include <string.h>

#include "freedave/host_device.h"

namespace freedave {

// log(p / (1 - p)) and its inverse. They rank positions, so all backends must find the same bits: each operation is
// rounded on its own (the build allows no fused multiply-add, and no library logarithm is called), in the sequence that
// freedave_kernels/reference/log_odds.py states, with the bounds of the error.

inline constexpr float kLn2High = 0.693359375f;  // 10 bits: its product with an exponent is exact
inline constexpr float kLn2Low = -2.12194440e-4f;

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

HD float log_odds(float confidence) {
  constexpr float kLeast = 0x1p-126f;
  const float p = confidence >= kLeast ? confidence : kLeast;  // so a NaN counts as the least
  const float ratio = p / (1.0f - p);  // in any case, so that a loop is compiled without a branch
  const float odds = p < 1.0f ? ratio : 0x1p25f;
  const int32_t bits = bits_of(odds);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;
  const float f = float_of(bits - (exponent << 23)) - 1.0f;  // odds = (1 + f) 2^exponent, f in [-0.3, 0.42)
  const float s = f / (f + 2.0f);
  const float z = s * s;
  float series = static_cast<float>(2.0 / 9);
  series = series * z + static_cast<float>(2.0 / 7);
  series = series * z + static_cast<float>(2.0 / 5);
  series = series * z + static_cast<float>(2.0 / 3);
  const float scale = static_cast<float>(exponent);
  return scale * kLn2High + ((s + s) + ((s * z) * series + scale * kLn2Low));
}

HD float sigmoid(float log_odds) {
  constexpr float kFurthest = 87.0f;
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23, which has no bits behind the point
  float x = log_odds < 0.0f ? log_odds : -log_odds;
  x = x > -kFurthest ? x : -kFurthest;  // a NaN, too
  const float exponent = (x * 1.44269502162933349609375f + kRounder) - kRounder;
  const float r = (x - exponent * kLn2High) - exponent * kLn2Low;
  float series = static_cast<float>(1.0 / 5040);
  series = series * r + static_cast<float>(1.0 / 720);
  series = series * r + static_cast<float>(1.0 / 120);
  series = series * r + static_cast<float>(1.0 / 24);
  series = series * r + static_cast<float>(1.0 / 6);
  series = series * r + static_cast<float>(1.0 / 2);
  const float exp = ((r * r) * series + r) + 1.0f;
  const float power = float_of((static_cast<int32_t>(exponent) + 127) << 23);
  const float odds = exp * power;
  const float smaller = odds / (odds + 1.0f);
  return log_odds > 0.0f ? 1.0f - smaller : smaller;
}

}  // namespace freedave
