#pragma once
#include <math.h>
#include <stdint.h>

#include "freedave/host_device.h"
#include "freedave/sampling.h"
#include "freedave/total_order.h"

namespace freedave {

enum class Measure : int32_t { kProb, kMargin, kNegEntropy, kLogOdds };

constexpr const char* name(Measure measure) {
  switch (measure) {
    case Measure::kProb:
      return "prob";
    case Measure::kMargin:
      return "margin";
    case Measure::kNegEntropy:
      return "neg_entropy";
    case Measure::kLogOdds:
      return "log_odds";
  }
  return nullptr;
}

// What a measure needs of a row, beside the largest logit and the sum of exponentials. No switch over measures has a
// default, so a new measure does not compile before it has an answer in each.

// The second largest logit.
HD constexpr bool needs_second(Measure measure) {
  switch (measure) {
    case Measure::kProb:
    case Measure::kNegEntropy:
    case Measure::kLogOdds:
      return false;
    case Measure::kMargin:
      return true;
  }
  __builtin_unreachable();
}

// Terms weighted by their logits, and the largest logits counted apart.
HD constexpr bool needs_entropy_terms(Measure measure) {
  switch (measure) {
    case Measure::kProb:
    case Measure::kMargin:
    case Measure::kLogOdds:
      return false;
    case Measure::kNegEntropy:
      return true;
  }
  __builtin_unreachable();
}

// The terms of all tokens but the chosen one, summed apart from its 1.
HD constexpr bool needs_others(Measure measure) {
  switch (measure) {
    case Measure::kProb:
    case Measure::kMargin:
    case Measure::kNegEntropy:
      return false;
    case Measure::kLogOdds:
      return true;
  }
  __builtin_unreachable();
}

// What is more certain counts as this: the others weigh e^-64 of the chosen token, while terms of some 2^-126 are lost.
inline constexpr float kLargestLogOdds = 64.0f;

// The softmax of part of a row: enough for the arg max and every measure of confidence, in one pass. In a peaked row
// the entropy and the log-odds are in digits that 1 + rest would round away. So for the entropy, logits equal to the
// maximum are counted apart from the terms of those below it, and for the log-odds the chosen token is counted apart
// from all others, equal ones among them. The other measures leave `ties` 0 and keep every term in `rest`.
//
// Where a token is drawn, logits are those divided by the temperature, and `token` is the one drawn; `second` is its
// noisy logit and `weighted` its logit, as no measure that is served then needs these.
struct OnlineSoftmax {
  float max;        // largest logit, -INFINITY when there is none
  float second;     // second largest, equal to max on a tie (kept for the margin only)
  int64_t token;    // lowest id whose logit is max, -1 when there is none
  double ties;      // how many logits, equal to max, are not in rest
  double rest;      // sum of exp(x - max) over all others; NaN when a logit was NaN or +inf
  double weighted;  // sum of (x - max) exp(x - max)
};

// The measures that a drawn token has.
HD constexpr bool measures_draws(Measure measure) { return !needs_second(measure) && !needs_entropy_terms(measure); }

HD void set_choice(OnlineSoftmax& s, const NoisyChoice& choice) {
  s.token = choice.token;
  s.second = choice.noisy;
  s.weighted = choice.token < 0 ? 0.0 : static_cast<double>(choice.logit);
}

HD NoisyChoice choice_of(const OnlineSoftmax& s) { return {s.second, static_cast<float>(s.weighted), s.token}; }

HD OnlineSoftmax empty_softmax() { return {-INFINITY, -INFINITY, -1, 0.0, 0.0, 0.0}; }

// Both parts of a row together. Merged in a fixed order, the result is bitwise reproducible.
HD OnlineSoftmax merge(const OnlineSoftmax& a, const OnlineSoftmax& b) {
  const bool a_leads = b.token < 0 || (a.token >= 0 && token_comes_first(a.max, a.token, b.max, b.token));
  OnlineSoftmax lead = a_leads ? a : b;
  const OnlineSoftmax other = a_leads ? b : a;
  if (other.token < 0) {  // nothing above -inf: adds no term, but its rest may be a NaN
    lead.rest += other.rest;
    return lead;
  }
  lead.second = lead.second > other.max ? lead.second : other.max;
  if (other.max == lead.max) {
    lead.ties += other.ties;
    lead.rest += other.rest;
    lead.weighted += other.weighted;
    return lead;
  }
  const double shift = static_cast<double>(other.max) - static_cast<double>(lead.max);
  const double scale = exp(shift);
  const double terms = other.ties + other.rest;
  lead.rest += scale * terms;
  lead.weighted += scale * (other.weighted + shift * terms);
  return lead;
}

HD OnlineSoftmax merge(const OnlineSoftmax& a, const OnlineSoftmax& b, bool drawn) {
  OnlineSoftmax both = merge(a, b);
  if (drawn) set_choice(both, first_of(choice_of(a), choice_of(b)));
  return both;
}

// A row with a NaN, a +inf, or nothing above -inf has no prediction.
HD bool is_broken(const OnlineSoftmax& s) {
  return s.token < 0 || !(s.max < INFINITY) || !(s.rest < static_cast<double>(INFINITY));
}

// How sure the model is of the chosen token of `s`, where `all` is the softmax that it is part of: p1, p1 - p2,
// sum p log p, or log(p1 / (1 - p1)). No difference of nearly equal numbers is taken. NaN, which nothing ranks, for
// what is no measure.
HD float confidence_of(const OnlineSoftmax& s, const OnlineSoftmax& all, Measure measure, bool drawn) {
  // Of the chosen token, relative to the largest: 0 where it is that.
  const double logit = (drawn ? s.weighted : static_cast<double>(s.max)) - static_cast<double>(all.max);
  const double sum = all.ties + all.rest;
  switch (measure) {
    case Measure::kProb:
      return static_cast<float>(exp(logit) / sum);
    case Measure::kMargin:
      return static_cast<float>(exp(logit) * -expm1(static_cast<double>(s.second) - static_cast<double>(s.max)) / sum);
    case Measure::kNegEntropy:
      // sum p log p = sum e (t - log Z) / Z with t = x - max and e = exp(t): two terms of one sign.
      return static_cast<float>(all.weighted / sum - (log(all.ties) + log1p(all.rest / all.ties)));
    case Measure::kLogOdds: {
      // What is beside the largest token; of another one, the largest is among its others.
      const double others = logit < 0.0 ? sum - exp(logit) : (all.ties - 1.0) + all.rest;
      const float log_odds = static_cast<float>(logit - log(others));  // inf where nothing else is left
      return log_odds < kLargestLogOdds ? log_odds : kLargestLogOdds;
    }
  }
  return NAN;
}

// The log-probability of a token whose logit is known.
HD float log_prob_of(float logit, const OnlineSoftmax& all) {
  const double log_sum = all.ties > 0.0 ? log(all.ties) + log1p(all.rest / all.ties) : log(all.rest);
  return static_cast<float>((static_cast<double>(logit) - static_cast<double>(all.max)) - log_sum);
}

}  // namespace freedave
