#pragma once

#include "cpu/parallel.h"
#include "freedave/build_drafts.h"
#include "freedave/draft_step.h"
#include "freedave/pooled_step.h"
#include "freedave/predict_tokens.h"
#include "freedave/rank_positions.h"
#include "freedave/select_transfer.h"
#include "freedave/verify_drafts.h"

namespace freedave::cpu {

// The whole interface of the CPU kernels, one launcher an op. Parameters are taken as checked.
void predict_tokens(const PredictTokensParams& p, ParallelFor run);
void partial_predictions(const PartialPredictionsParams& p, ParallelFor run);
void merge_predictions(const MergePredictionsParams& p, ParallelFor run);
void rank_positions(const RankPositionsParams& p, ParallelFor run);
void select_transfer(const SelectTransferParams& p, ParallelFor run);
void build_drafts(const BuildDraftsParams& p, ParallelFor run);
void verify_drafts(const VerifyDraftsParams& p, ParallelFor run);
void draft_step(const DraftStepParams& p, ParallelFor run);
void pooled_step(const PooledStepParams& p, ParallelFor run);

}  // namespace freedave::cpu
