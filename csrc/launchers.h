#pragma once

// The kernels of one device as a table, for callers that do not go through torch's dispatcher. Two libraries of one
// build share it; `sizes` tells them apart from others.
#include <array>
#include <cstddef>
#include <exception>

#include "freedave/build_drafts.h"
#include "freedave/draft_step.h"
#include "freedave/predict_tokens.h"
#include "freedave/rank_positions.h"
#include "freedave/select_transfer.h"
#include "freedave/verify_drafts.h"

namespace freedave {

// False: the kernel failed. The same call through the dispatcher says why.
template <typename Params>
using Launcher = bool (*)(const Params&) noexcept;

inline constexpr size_t kOps = 8;

struct Launchers {
  std::array<size_t, kOps> sizes;
  Launcher<PredictTokensParams> predict_tokens;
  Launcher<PartialPredictionsParams> partial_predictions;
  Launcher<MergePredictionsParams> merge_predictions;
  Launcher<RankPositionsParams> rank_positions;
  Launcher<SelectTransferParams> select_transfer;
  Launcher<BuildDraftsParams> build_drafts;
  Launcher<VerifyDraftsParams> verify_drafts;
  Launcher<DraftStepParams> draft_step;
};

inline constexpr std::array<size_t, kOps> kParamsSizes = {
    sizeof(PredictTokensParams), sizeof(PartialPredictionsParams), sizeof(MergePredictionsParams),
    sizeof(RankPositionsParams), sizeof(SelectTransferParams),     sizeof(BuildDraftsParams),
    sizeof(VerifyDraftsParams),  sizeof(DraftStepParams)};

template <typename Device, typename Params>
bool launch_on(const Params& p) noexcept {
  try {
    Device::launch(p);
    return true;
  } catch (const std::exception&) {
    return false;
  }
}

template <typename Device>
Launchers launchers_of() {
  return {.sizes = kParamsSizes,
          .predict_tokens = launch_on<Device, PredictTokensParams>,
          .partial_predictions = launch_on<Device, PartialPredictionsParams>,
          .merge_predictions = launch_on<Device, MergePredictionsParams>,
          .rank_positions = launch_on<Device, RankPositionsParams>,
          .select_transfer = launch_on<Device, SelectTransferParams>,
          .build_drafts = launch_on<Device, BuildDraftsParams>,
          .verify_drafts = launch_on<Device, VerifyDraftsParams>,
          .draft_step = launch_on<Device, DraftStepParams>};
}

}  // namespace freedave
