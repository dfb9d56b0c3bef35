#pragma once
#include <stdint.h>
#include <string.h>

#include "freedave/host_device.h"

namespace freedave {

enum class LogitType : int32_t { kFloat32, kBFloat16, kFloat16 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

HD float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

HD float to_float(float x) { return x; }
HD float to_float(BFloat16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }

// The exponent is rebiased by a multiplication, which also normalises subnormals; inf and NaN keep their exponent.
HD float to_float(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | magnitude << 13);
  const float value = float_from_bits(magnitude << 13) * 0x1p112f;
  return sign ? -value : value;
}

}  // namespace freedave
