#pragma once
#include <stdint.h>

#include "freedave/online_softmax.h"
#include "freedave/predict_tokens.h"

namespace freedave {

// What predictions read of a row once its scan is done: the suppressed tokens that stay in the softmax, and the one to
// be scored. They are few, so the scan knows nothing of them.

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
  if (!p.drawn()) return logit;
  const int64_t row = flat / p.length, place = flat % p.length;
  return logit < p.floor_at(row, place) ? -INFINITY : logit * p.scale_at(row, place);
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

// The softmax of some of `count` single logits: every `step`-th from `first` on.
template <typename LogitAt>
HD OnlineSoftmax softmax_of(int64_t first, int64_t step, int64_t count, const LogitAt& logit_at) {
  OnlineSoftmax part = empty_softmax();
  for (int64_t i = first; i < count; i += step) {
    const float logit = logit_at(i);
    if (logit == -INFINITY) continue;
    if (!(logit < INFINITY)) {  // breaks the row, as in the scan
      part.rest = NAN;
      continue;
    }
    part = merge(part, OnlineSoftmax{logit, -INFINITY, i, 1.0, 0.0, 0.0});
  }
  return part;
}

// Of the suppressed tokens. One that is listed more than once counts where it stands first.
HD OnlineSoftmax forbidden_part(const LogitsToScan& p, int64_t flat, int64_t first, int64_t step) {
  return softmax_of(first, step, p.num_suppress_tokens, [&](int64_t i) {
    const int64_t token = suppressed_token(p, i);
    const float logit = logit_of(p, flat, token);
    return logit == -INFINITY || is_suppressed(p, token, i) ? -INFINITY : logit;
  });
}

// One of a row's single logits: -INFINITY in all states but that of its token's part, or in all of them.
HD float single_logit(const MergePredictionsParams& p, const double* states, int64_t nth) {
  double found = -INFINITY;
  for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
    const double logit = states[chunk * p.state_rows.step + kStateFields + nth];
    if (logit > found || logit != logit) found = logit;  // a NaN stays
  }
  return static_cast<float>(found);
}

HD OnlineSoftmax forbidden_part(const MergePredictionsParams& p, const double* states, int64_t first, int64_t step) {
  return softmax_of(first, step, p.single_logits - 1, [&](int64_t i) { return single_logit(p, states, 1 + i); });
}

// The log-probability of the token to be scored: -inf where it has no probability, NaN where none is asked for.
HD float scored(const PredictTokensParams& p, int64_t flat, const OnlineSoftmax& all) {
  const int64_t token = p.scored_ids.at(flat / p.length, flat % p.length);
  if (token < 0) return NAN;
  if (p.suppress == Suppress::kExclude && is_suppressed(p, token, p.num_suppress_tokens)) return -INFINITY;
  return log_prob_of(logit_of(p, flat, token), all);
}

}  // namespace freedave
