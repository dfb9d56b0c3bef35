// A row's states as one: merged in vocabulary order, whoever made them.
#include "cpu/launch.h"

namespace freedave::cpu {

void merge_predictions(const MergePredictionsParams& p, ParallelFor) {
  for (int64_t row = 0; row < p.input_ids.rows.count; ++row) {
    for (int64_t position = 0; position < p.length; ++position) {
      const int64_t flat = row * p.length + position;
      const double* state = p.states + p.state_rows.start(flat);
      OnlineSoftmax whole = load_state(state);
      for (int64_t chunk = 1; chunk < p.chunks; ++chunk) {
        whole = merge(whole, load_state(state + chunk * p.state_rows.step));
      }
      const bool broken = is_broken(whole);
      p.token_ids[flat] = broken ? p.input_ids.at(row, position) : whole.token;
      p.confidence[flat] = broken ? -INFINITY : confidence_of(whole, p.measure);
    }
  }
}

}  // namespace freedave::cpu
