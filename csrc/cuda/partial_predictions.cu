// What is known of each stretch of a vocabulary, for rows whose logits do not exist all at once: the scan alone.
#include "cuda/launch.h"

namespace freedave::cuda {

cudaError_t partial_predictions(const PartialPredictionsParams& p, cudaStream_t stream) {
  return scan_logits(p, kTokensPerState, p.states, stream);
}

}  // namespace freedave::cuda
