#pragma once
#include <stdint.h>

#include "freedave/online_softmax.h"
#include "freedave/predict_tokens.h"

namespace freedave {

// What predict_tokens reads of a row once its scan is done: the suppressed tokens that stay in the softmax, and the one
// to be scored. They are few, so the scan knows nothing of them.

// The logit of one token as the scan sees it where it is not suppressed; -inf where there is none. `flat` is over [*,
// L].
HD float logit_of(const LogitsToScan& p, int64_t flat, int64_t token) {
  if (token < 0 || token >= p.vocab) return -INFINITY;
  const bool shifted = p.logits_shift && flat % p.length > 0;
  const int64_t at = p.logit_rows.start(flat - shifted) + token;
  float logit = 0.0f;
  switch (p.logit_type) {
    case LogitType::kFloat32:
      logit = static_cast<const float*>(p.logits)[at];
      break;
    case LogitType::kBFloat16:
      logit = to_float(static_cast<const BFloat16*>(p.logits)[at]);
      break;
    case LogitType::kFloat16:
      logit = to_float(static_cast<const Float16*>(p.logits)[at]);
      break;
  }
  if (!(p.inverse_temperature > 0.0f)) return logit;
  return logit < p.floor_at(flat / p.length, flat % p.length) ? -INFINITY : logit * p.inverse_temperature;
}

HD int64_t suppressed_token(const LogitsToScan& p, int64_t index) {
  return p.suppress_tokens[index * p.suppress_tokens_step];
}

HD bool is_suppressed(const LogitsToScan& p, int64_t token, int64_t listed) {
  for (int64_t i = 0; i < listed; ++i) {
    if (suppressed_token(p, i) == token) return true;
  }
  return false;
}

// The softmax of some of the suppressed tokens: every `step`-th of the list from `first` on. A token that is listed
// more than once counts where it stands first.
HD OnlineSoftmax forbidden_part(const LogitsToScan& p, int64_t flat, int64_t first, int64_t step) {
  OnlineSoftmax part = empty_softmax();
  for (int64_t i = first; i < p.num_suppress_tokens; i += step) {
    const int64_t token = suppressed_token(p, i);
    const float logit = logit_of(p, flat, token);
    if (logit == -INFINITY || is_suppressed(p, token, i)) continue;
    if (!(logit < INFINITY)) {  // breaks the row, as in the scan
      part.rest = NAN;
      continue;
    }
    part = merge(part, OnlineSoftmax{logit, -INFINITY, token, 1.0, 0.0, 0.0});
  }
  return part;
}

// The log-probability of the token to be scored: -inf where it has no probability, NaN where none is asked for.
HD float scored(const PredictTokensParams& p, int64_t flat, const OnlineSoftmax& all) {
  const int64_t token = p.scored_ids.at(flat / p.length, flat % p.length);
  if (token < 0) return NAN;
  if (p.suppress == Suppress::kExclude && is_suppressed(p, token, p.num_suppress_tokens)) return -INFINITY;
  return log_prob_of(logit_of(p, flat, token), all);
}

}  // namespace freedave
