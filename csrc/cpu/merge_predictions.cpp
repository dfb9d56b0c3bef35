// Merges the states of each row, in vocabulary order, so that the result does not depend on who made them.
#include "cpu/merge_predictions.h"

#include "cpu/parallel.h"
#include "freedave/predict_tokens.h"
#include "freedave/single_logits.h"

namespace freedave::cpu {

void launch(const MergePredictionsParams& p, ParallelFor) {
  for (int64_t row = 0; row < p.input_ids.rows.count; ++row) {
    for (int64_t position = 0; position < p.length; ++position) {
      const int64_t flat = row * p.length + position;
      const double* states = p.states + p.state_rows.start(flat);
      const auto state_of = [&](int64_t chunk) { return load_state(states + chunk * p.state_rows.step); };
      const OnlineSoftmax whole = merge_row(p.chunks, p.drawn, state_of);
      const OnlineSoftmax all = p.single_logits > 0 ? merge(whole, forbidden_part(p, states, 0, 1)) : whole;
      write_prediction(whole, all, p.measure, p.drawn, p.input_ids.at(row, position), p.token_ids[flat],
                       p.confidence[flat]);
      if (p.single_logits == 0) continue;
      p.log_probs[flat] = p.confidence[flat] > -INFINITY ? log_prob_of(single_logit(p, states, 0), all) : NAN;
    }
  }
}

}  // namespace freedave::cpu
