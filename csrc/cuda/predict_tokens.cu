// token[i] = arg max_v x[i, v] and its confidence, e.g. 1 / sum_v exp(x[i, v] - max), for the masked rows i: the scan
// of scan_logits.cu over long chunks, and the merge of merge_predictions.cu.
#include "cuda/scan_logits.h"

namespace freedave::cuda {
namespace {

int64_t rows_of(const PredictTokensParams& p) { return p.input_ids.rows.count * p.length; }

}  // namespace

int64_t workspace_bytes(const PredictTokensParams& p) {
  return rows_of(p) * chunks_of(p.vocab, kChunk) * kStateFields * static_cast<int64_t>(sizeof(double));
}

Error launch(const PredictTokensParams& p, void* workspace, Stream stream) {
  auto* states = static_cast<double*>(workspace);
  const cudaError_t error = scan_logits(p, kChunk, states, stream);
  if (error != cudaSuccess) return error;
  const int64_t chunks = chunks_of(p.vocab, kChunk);
  const MergePredictionsParams merge{.states = states,
                                     .state_rows = {.count = rows_of(p),
                                                    .step = kStateFields,
                                                    .row_stride = chunks * kStateFields,
                                                    .dims = 1,
                                                    .size = {rows_of(p)},
                                                    .stride = {chunks * kStateFields}},
                                     .chunks = chunks,
                                     .length = p.length,
                                     .input_ids = p.input_ids,
                                     .measure = p.measure,
                                     .drawn = p.inverse_temperature > 0.0f,
                                     .token_ids = p.token_ids,
                                     .confidence = p.confidence};
  return launch(merge, stream);
}

}  // namespace freedave::cuda
