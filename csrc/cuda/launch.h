#pragma once
#include <cuda_runtime_api.h>

#include "freedave/build_drafts.h"
#include "freedave/draft_step.h"
#include "freedave/predict_tokens.h"
#include "freedave/rank_positions.h"
#include "freedave/select_transfer.h"
#include "freedave/verify_drafts.h"

namespace freedave::cuda {

// The whole interface of the CUDA kernels, one launcher an op, the same parameters as on the CPU. Asynchronous on
// `stream` of the current device.
cudaError_t predict_tokens(const PredictTokensParams& p, cudaStream_t stream);
cudaError_t rank_positions(const RankPositionsParams& p, cudaStream_t stream);
cudaError_t select_transfer(const SelectTransferParams& p, cudaStream_t stream);
cudaError_t build_drafts(const BuildDraftsParams& p, cudaStream_t stream);
cudaError_t verify_drafts(const VerifyDraftsParams& p, cudaStream_t stream);
cudaError_t draft_step(const DraftStepParams& p, cudaStream_t stream);

}  // namespace freedave::cuda
