#pragma once
#include <stdint.h>
#include <string.h>

#include "freedave/host_device.h"

namespace freedave {

// The two total orders that decide every tie, so that results do not depend on the backend.

enum class Order : int32_t { kConfidence, kLeftToRight };

constexpr const char* name(Order order) {
  switch (order) {
    case Order::kConfidence:
      return "confidence";
    case Order::kLeftToRight:
      return "left_to_right";
  }
  return nullptr;
}

// Vocabulary: larger logit first, then the lower token id.
HD bool token_comes_first(float logit_a, int64_t token_a, float logit_b, int64_t token_b) {
  return logit_a > logit_b || (logit_a == logit_b && token_a < token_b);
}

// A position may be committed only with a confidence: NaN and -inf mark a broken row.
HD bool is_rankable(float confidence) { return confidence > -__builtin_inff(); }

// Integers that order as the confidences do, largest confidence first. -0.0 and 0.0 are equal confidences, hence + 0.
HD uint32_t descending(float confidence) {
  confidence += 0.0f;
  uint32_t bits;
  memcpy(&bits, &confidence, sizeof(bits));
  return bits & 0x80000000u ? bits : ~bits & 0x7fffffffu;
}

// The confidence (never NaN, never -0.0) that has this place among descending ones.
HD float confidence_at(uint32_t descending) {
  const uint32_t bits = descending & 0x80000000u ? descending : ~descending & 0x7fffffffu;
  float confidence;
  memcpy(&confidence, &bits, sizeof(bits));
  return confidence;
}

// Positions of one block: higher confidence first, then the lower position (or the position alone). Smaller keys rank
// first. Blocks are walked from the lowest up, so the block is not part of the key. Positions stay below 2^32.
HD uint64_t position_key(Order order, float confidence, int64_t position) {
  const uint64_t low = static_cast<uint64_t>(position);
  switch (order) {
    case Order::kConfidence:
      return static_cast<uint64_t>(descending(confidence)) << 32 | low;
    case Order::kLeftToRight:
      return low;
  }
  __builtin_unreachable();
}

HD int64_t position_of(uint64_t key) { return static_cast<int64_t>(key & 0xffffffffu); }

}  // namespace freedave
