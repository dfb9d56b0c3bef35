#pragma once
#include <cmath>
#include <cstdint>

#include "freedave/host_device.h"
#include "freedave/rows.h"
#include "freedave/total_order.h"

namespace freedave {

// What a threshold bounds. A step asks in the order of its ranking, and goes on to the first position that fails.
enum class Rule : int32_t { kThreshold, kStrict, kFactor, kEntropyBound };

constexpr const char* name(Rule rule) {
  switch (rule) {
    case Rule::kThreshold:
      return "threshold";
    case Rule::kStrict:
      return "strict";
    case Rule::kFactor:
      return "factor";
    case Rule::kEntropyBound:
      return "entropy_bound";
  }
  return nullptr;
}

// Whether a position passes by its own confidence alone, whatever its rank.
HD bool ignores_rank(Rule rule) { return rule == Rule::kThreshold || rule == Rule::kStrict; }

// A threshold is a float64 everywhere: a confidence is compared with the number that was asked for, not with the
// nearest float32.
HD bool is_above(Rule rule, float confidence, double threshold) {
  return rule == Rule::kStrict ? confidence > threshold : confidence >= threshold;
}

// How far a step goes, asked for one ranked position after the other until one fails.
struct Passing {
  Rule rule;
  double threshold;  // NaN: nothing passes
  int count = 0;     // how many have passed
  double entropy = 0.0;

  HD bool passes(float confidence) {
    const bool next = goes_on(confidence);
    count += next;
    return next;
  }

  // Fast-dLLM's: a last position is not left alone, so `left` masked ones behind those that pass are filled as well.
  HD bool takes_last(int64_t left) const { return rule == Rule::kFactor && count > 0 && left == 1; }

 private:
  HD bool goes_on(float confidence) {
    switch (rule) {
      case Rule::kThreshold:
      case Rule::kStrict:
        return is_above(rule, confidence, threshold);
      case Rule::kFactor: {
        const double limit = 1.0 - threshold / (count + 2);
        return count == 0 ? threshold == threshold : confidence >= limit;
      }
      case Rule::kEntropyBound:
        entropy -= confidence < 0.0f ? static_cast<double>(confidence) : 0.0;
        return entropy < threshold;
    }
    __builtin_unreachable();
  }
};

// One step of static decoding of a sequence, the step that everything else must agree with.
struct StepRule {
  int64_t mask_token_id;
  int64_t tokens_per_step;
  int64_t block_length;  // the window's length when the caller gave none
  bool has_threshold;
  double threshold;
  Rule rule;  // what the threshold bounds
  Order order;
  int64_t eos_token_id;  // negative: nothing ends the sequence

  HD bool ends(int64_t token) const { return eos_token_id >= 0 && token == eos_token_id; }
};

// A number for all sequences, or one each, of 32 or 64 bits.
template <typename T>
struct Setting {
  T of_all;
  const void* each;  // [B]; null when the caller gave none
  int64_t stride;
  bool is_32_bit;

  HD T of(int64_t b) const { return each == nullptr ? of_all : number_at<T>(each, is_32_bit, b * stride); }
};

// The rules of a batch.
struct StepRules {
  int64_t mask_token_id;
  int64_t block_length;
  Order order;
  bool has_threshold;
  Rule rule;
  Setting<double> threshold;         // NaN: that sequence has none
  Setting<int64_t> tokens_per_step;  // below 1 counts as 1, so that every step fills something
  Setting<int64_t> eos_token_id;

  HD StepRule of(int64_t b) const {
    const int64_t tokens = tokens_per_step.of(b);
    const double limit = threshold.of(b);
    const bool is_number = limit == limit;
    return {mask_token_id, tokens < 1 ? 1 : tokens, block_length, has_threshold && is_number, limit, rule,
            order,         eos_token_id.of(b)};
  }
};

// How sure the model is of `token` for the sake of a step. Where it predicts the mask itself, it predicts nothing: a
// step never fills a position with the mask.
HD float confidence_in(int64_t token, float confidence, int64_t mask_token_id) {
  return token == mask_token_id ? -INFINITY : confidence;
}

// Positions [begin, end) of a window.
struct Span {
  int64_t begin, end;
};

// The block that `position` lies in; the last block may be shorter.
HD Span block_around(int64_t position, int64_t block_length, int64_t length) {
  const int64_t begin = position - position % block_length;
  const int64_t end = block_length < length - begin ? begin + block_length : length;
  return {begin, end};
}

// The current block: the lowest with a masked position. Empty, at the end of the window, when nothing is masked.
template <typename IsMasked>
HD Span current_block(const IsMasked& is_masked, int64_t block_length, int64_t length) {
  for (int64_t i = 0; i < length; ++i) {
    if (is_masked(i)) return block_around(i, block_length, length);
  }
  return {length, length};
}

}  // namespace freedave
