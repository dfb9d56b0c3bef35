#pragma once
#include <cuda_runtime_api.h>

#include "freedave/build_drafts.h"
#include "freedave/draft_step.h"
#include "freedave/limits.h"
#include "freedave/predict_tokens.h"
#include "freedave/rank_positions.h"
#include "freedave/select_transfer.h"
#include "freedave/verify_drafts.h"

namespace freedave::cuda {

// The whole interface of the CUDA kernels, one launcher an op, the same parameters as on the CPU. Asynchronous on
// `stream` of the current device; nothing is allocated, copied or waited for, so every call can be captured in a graph.
// predict_tokens is two launches, every other op one.
cudaError_t predict_tokens(const PredictTokensParams& p, void* workspace, cudaStream_t stream);
cudaError_t partial_predictions(const PartialPredictionsParams& p, cudaStream_t stream);
cudaError_t merge_predictions(const MergePredictionsParams& p, cudaStream_t stream);
cudaError_t rank_positions(const RankPositionsParams& p, cudaStream_t stream);
cudaError_t select_transfer(const SelectTransferParams& p, cudaStream_t stream);
cudaError_t build_drafts(const BuildDraftsParams& p, cudaStream_t stream);
cudaError_t verify_drafts(const VerifyDraftsParams& p, cudaStream_t stream);
cudaError_t draft_step(const DraftStepParams& p, cudaStream_t stream);

// The pass over the vocabulary that both predictions begin with: one state for each `chunk_size` logits of a row.
// `chunk_size` is at most kChunk and a multiple of what a block takes at once (kSweep in scan_logits.cu).
cudaError_t scan_logits(const LogitsToScan& p, int64_t chunk_size, double* states, cudaStream_t stream);

// Bytes of device memory that predict_tokens works in.
int64_t predict_tokens_workspace(const PredictTokensParams& p);

}  // namespace freedave::cuda
