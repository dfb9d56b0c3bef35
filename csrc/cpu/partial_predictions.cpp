// One state for each 4096 logits of a row: the scan alone. It serves callers that never hold all logits of a row.
#include "cpu/parallel.h"
#include "cpu/scan_logits.h"
#include "freedave/predict_tokens.h"

namespace freedave::cpu {

void launch(const PartialPredictionsParams& p, ParallelFor run) {
  const Scanned scanned = scan_logits(p, kTokensPerState, DrawnFrom::kChunk, run);
  const int64_t states = p.input_ids.rows.count * p.length * scanned.chunks;
  for (int64_t state = 0; state < states; ++state) store_state(empty_softmax(), p.states + state * kStateFields);
  const OnlineSoftmax* partial = scanned.partials;
  for (const int64_t flat : scanned.masked) {
    double* row = p.states + flat * scanned.chunks * kStateFields;
    for (int64_t chunk = 0; chunk < scanned.chunks; ++chunk) {
      OnlineSoftmax state = *partial++;
      // Merging tiles has written to fields that this measure does not use. In a state they are neutral.
      const bool drawn = p.drawn();
      if (!needs_second(p.measure) && !drawn) state.second = -INFINITY;
      if (!needs_entropy_terms(p.measure) && !drawn) state.weighted = 0.0;
      store_state(state, row + chunk * kStateFields);
    }
  }
}

}  // namespace freedave::cpu
