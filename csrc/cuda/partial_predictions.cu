// One state for each 4096 logits of a row: the scan alone. It serves callers that never hold all logits of a row.
#include "cuda/launch.h"

namespace freedave::cuda {

cudaError_t partial_predictions(const PartialPredictionsParams& p, cudaStream_t stream) {
  return scan_logits(p, kTokensPerState, p.states, stream);
}

}  // namespace freedave::cuda
