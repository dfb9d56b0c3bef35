// One state for each 4096 logits of a row: the scan alone. It serves callers that never hold all logits of a row.
#include "cuda/scan_logits.h"

namespace freedave::cuda {

Error launch(const PartialPredictionsParams& p, Stream stream) {
  return scan_logits(p, kTokensPerState, p.states, stream);
}

}  // namespace freedave::cuda
