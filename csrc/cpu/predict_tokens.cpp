// token[i] = arg max_v x[i, v] and its confidence, e.g. 1 / sum_v exp(x[i, v] - max), for the masked rows i: the scan
// of scan_logits.cpp and the merge of merge_predictions.h.
#include "freedave/predict_tokens.h"

#include "cpu/merge_predictions.h"
#include "cpu/parallel.h"
#include "cpu/scan_logits.h"
#include "freedave/single_logits.h"

namespace freedave::cpu {

void launch(const PredictTokensParams& p, ParallelFor run) {
  const Scanned scanned = scan_logits(p, kChunk, DrawnFrom::kRow, run);
  const bool drawn = p.drawn(), scores = p.scored_ids.data != nullptr;
  for (int64_t row = 0; row < p.input_ids.rows.count; ++row) {
    for (int64_t position = 0; position < p.length; ++position) {
      const int64_t flat = row * p.length + position;
      p.token_ids[flat] = p.input_ids.at(row, position);
      p.confidence[flat] = -INFINITY;
      if (scores) p.log_probs[flat] = NAN;
    }
  }
  const OnlineSoftmax* partials = scanned.partials;
  for (const int64_t flat : scanned.masked) {
    const OnlineSoftmax whole = merge_row(scanned.chunks, drawn, [&](int64_t chunk) { return partials[chunk]; });
    partials += scanned.chunks;
    const OnlineSoftmax all = p.suppress == Suppress::kForbid ? merge(whole, forbidden_part(p, flat, 0, 1)) : whole;
    write_prediction(whole, all, p.measure, drawn, p.token_ids[flat], p.token_ids[flat], p.confidence[flat]);
    if (scores && p.confidence[flat] > -INFINITY) p.log_probs[flat] = scored(p, flat, all);
  }
}

}  // namespace freedave::cpu
