// token[i] = arg max_v x[i, v] and its confidence, e.g. 1 / sum_v exp(x[i, v] - max), for the masked rows i.
#include "cpu/launch.h"
#include "cpu/scan_logits.h"

namespace freedave::cpu {

void predict_tokens(const PredictTokensParams& p, ParallelFor run) {
  const Scanned scanned = scan_logits(p, kChunk, run);
  for (int64_t row = 0; row < p.input_ids.rows.count; ++row) {
    for (int64_t position = 0; position < p.length; ++position) {
      p.token_ids[row * p.length + position] = p.input_ids.at(row, position);
      p.confidence[row * p.length + position] = -INFINITY;
    }
  }
  const OnlineSoftmax* partial = scanned.partials;
  for (const int64_t flat : scanned.masked) {
    OnlineSoftmax whole = *partial++;
    for (int64_t chunk = 1; chunk < scanned.chunks; ++chunk) whole = merge(whole, *partial++);
    if (is_broken(whole)) continue;
    p.token_ids[flat] = whole.token;
    p.confidence[flat] = confidence_of(whole, p.measure);
  }
}

}  // namespace freedave::cpu
