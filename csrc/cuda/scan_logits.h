#pragma once
#include <cuda_runtime_api.h>

#include "freedave/predict_tokens.h"

namespace freedave::cuda {

// The pass over the vocabulary that both predictions begin with: one state for each `chunk_size` logits of a row.
// `chunk_size` is at most kChunk and a multiple of what a block takes at once (kSweep in scan_logits.cu).
cudaError_t scan_logits(const LogitsToScan& p, int64_t chunk_size, double* states, cudaStream_t stream);

}  // namespace freedave::cuda
