#pragma once

// What a call of each op does on the host: arguments checked, outputs made, the kernel started. The same for every edge
// by which calls come in (torch's dispatcher in ops.cpp, Python in python_calls.cpp); an Edge says what its tensors and
// words are, how outputs are made, and which kernels it starts.
//
// The Python wrappers explain a wrong argument at length; the checks here make a raw call memory-safe.
#include <cmath>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "freedave/build_drafts.h"
#include "freedave/draft_step.h"
#include "freedave/predict_tokens.h"
#include "freedave/rank_positions.h"
#include "freedave/select_transfer.h"
#include "freedave/verify_drafts.h"

namespace freedave {

inline Order order_of(const char* op, std::string_view order) {
  return choose<Order>(op, "order", order, {"confidence", "left_to_right"});
}
inline Measure measure_of(const char* op, std::string_view measure) {
  return choose<Measure>(op, "measure", measure, {"prob", "margin", "neg_entropy"});
}
inline Match match_of(const char* op, std::string_view match) {
  return choose<Match>(op, "match", match, {"exact", "subset"});
}

// Positions are sorted as 32-bit numbers.
inline int64_t length_of(const Argument& tensor) {
  const int64_t length = tensor.sizes[tensor.dims - 1];
  STD_TORCH_CHECK(length <= INT32_MAX, tensor.op, ": ", tensor.name, " must have fewer than 2^31 positions, got shape ",
                  tensor.shape());
  return length;
}

inline int64_t block_length_of(const char* op, std::optional<int64_t> block_length, int64_t length) {
  return block_length ? expect_at_least(op, "block_length", *block_length, 1) : length;
}

inline float threshold_of(const char* op, std::optional<double> threshold) {
  STD_TORCH_CHECK(!threshold || !std::isnan(*threshold), op, ": threshold must be a number, got nan");
  return static_cast<float>(threshold.value_or(0.0));
}

inline StepRule step_rule(const char* op, int64_t length, int64_t mask_token_id, int64_t tokens_per_step,
                          std::optional<double> threshold, std::string_view order,
                          std::optional<int64_t> block_length) {
  return {.mask_token_id = mask_token_id,
          .tokens_per_step = expect_at_least(op, "tokens_per_step", tokens_per_step, 1),
          .block_length = block_length_of(op, block_length, length),
          .has_threshold = threshold.has_value(),
          .threshold = threshold_of(op, threshold),
          .order = order_of(op, order)};
}

template <typename Edge>
struct Calls {
  using Tensor = typename Edge::Tensor;
  using Word = typename Edge::Word;  // converts to std::string_view
  using Output = typename Edge::Output;
  using Released = typename Edge::Released;

  static std::tuple<Released, Released> predict_tokens(const Tensor& logits_, const Tensor& input_ids_,
                                                       int64_t mask_token_id, const std::optional<Tensor>& mask_index,
                                                       const Word& measure,
                                                       const std::optional<Tensor>& suppress_tokens,
                                                       bool logits_shift) {
    constexpr const char* kOp = "predict_tokens";
    const Argument logits = Edge::argument(kOp, "logits", logits_);
    const Argument input_ids = Edge::argument(kOp, "input_ids", input_ids_);
    const LogitsToScan scan =
        to_scan(logits, input_ids, mask_token_id, 0, mask_index, measure, suppress_tokens, logits_shift);
    Output token_ids(DType::kInt64, input_ids), confidence(DType::kFloat32, input_ids);
    Edge::launch(logits,
                 PredictTokensParams{scan, token_ids.template data<int64_t>(), confidence.template data<float>()});
    return {token_ids.release(), confidence.release()};
  }

  static Released partial_predictions(const Tensor& logits_, const Tensor& input_ids_, int64_t mask_token_id,
                                      int64_t first_token_id, const std::optional<Tensor>& mask_index,
                                      const Word& measure, const std::optional<Tensor>& suppress_tokens,
                                      bool logits_shift) {
    constexpr const char* kOp = "partial_predictions";
    const Argument logits = Edge::argument(kOp, "logits", logits_);
    const Argument input_ids = Edge::argument(kOp, "input_ids", input_ids_);
    const LogitsToScan scan =
        to_scan(logits, input_ids, mask_token_id, first_token_id, mask_index, measure, suppress_tokens, logits_shift);
    STD_TORCH_CHECK(first_token_id <= kTokenIds - scan.vocab, kOp, ": token ids must lie below 2^53, got ", scan.vocab,
                    " from first_token_id ", first_token_id);
    std::vector<int64_t> sizes(input_ids.sizes, input_ids.sizes + input_ids.dims);
    sizes.insert(sizes.end(), {chunks_of(scan.vocab, kTokensPerState), kStateFields});
    Output states(DType::kFloat64, input_ids, sizes.data(), static_cast<int64_t>(sizes.size()));
    Edge::launch(logits, PartialPredictionsParams{scan, states.template data<double>()});
    return states.release();
  }

  static std::tuple<Released, Released> merge_predictions(const Tensor& states_, const Tensor& input_ids_,
                                                          const Word& measure) {
    constexpr const char* kOp = "merge_predictions";
    const Argument states = Edge::argument(kOp, "states", states_);
    const Argument input_ids = Edge::argument(kOp, "input_ids", input_ids_);
    states.expect({DType::kFloat64});
    const int64_t leading = states.dims - 2;
    STD_TORCH_CHECK(leading >= 1 && states.sizes[leading] >= 1 && states.sizes[leading + 1] == kStateFields, kOp,
                    ": states must have shape [*, L, C, 6], got ", states.shape());
    STD_TORCH_CHECK(states.strides[leading + 1] == 1, kOp,
                    ": the last dimension of states must be contiguous, got stride ", states.strides[leading + 1]);
    input_ids.expect({DType::kInt64}).expect_shape_of(states, leading);

    Output token_ids(DType::kInt64, input_ids), confidence(DType::kFloat32, input_ids);
    Edge::launch(states, MergePredictionsParams{.states = static_cast<const double*>(states.data),
                                                .state_rows = states.rows(leading, states.strides[leading]),
                                                .chunks = states.sizes[leading],
                                                .length = input_ids.sizes[input_ids.dims - 1],
                                                .input_ids = input_ids.matrix<int64_t>(),
                                                .measure = measure_of(kOp, measure),
                                                .token_ids = token_ids.template data<int64_t>(),
                                                .confidence = confidence.template data<float>()});
    return {token_ids.release(), confidence.release()};
  }

  static Released rank_positions(const Tensor& confidence_, const Tensor& mask_index_, const Word& order,
                                 std::optional<int64_t> block_length) {
    constexpr const char* kOp = "rank_positions";
    const Argument confidence = Edge::argument(kOp, "confidence", confidence_);
    const Argument mask_index = Edge::argument(kOp, "mask_index", mask_index_);
    confidence.expect({DType::kFloat32});
    STD_TORCH_CHECK(confidence.dims >= 1, kOp, ": confidence must have at least 1 dimension");
    mask_index.expect({DType::kBool}).expect_shape_of(confidence);
    const int64_t length = length_of(confidence);

    Output rank(DType::kInt32, confidence);
    Edge::launch(confidence, RankPositionsParams{.confidence = confidence.matrix<float>(),
                                                 .mask_index = mask_index.matrix<bool>(),
                                                 .length = length,
                                                 .block_length = block_length_of(kOp, block_length, length),
                                                 .order = order_of(kOp, order),
                                                 .rank = rank.template data<int32_t>()});
    return rank.release();
  }

  static Released select_transfer(const Tensor& confidence_, const Tensor& mask_index_, int64_t num_transfer,
                                  const std::optional<Tensor>& num_transfer_per_row_, std::optional<double> threshold,
                                  bool strict, const Word& fallback, const Word& order,
                                  std::optional<int64_t> block_length) {
    constexpr const char* kOp = "select_transfer";
    const Argument confidence = Edge::argument(kOp, "confidence", confidence_);
    const Argument mask_index = Edge::argument(kOp, "mask_index", mask_index_);
    confidence.expect({DType::kFloat32});
    STD_TORCH_CHECK(confidence.dims >= 1, kOp, ": confidence must have at least 1 dimension");
    mask_index.expect({DType::kBool}).expect_shape_of(confidence);
    const int64_t length = length_of(confidence);
    Counts counts{};
    if (num_transfer_per_row_) {
      const Argument per_row = Edge::argument(kOp, "num_transfer_per_row", *num_transfer_per_row_);
      counts = per_row.expect({DType::kInt32, DType::kInt64}).expect_shape_of(confidence, confidence.dims - 1).counts();
    }

    Output transfer_index(DType::kBool, confidence);
    Edge::launch(confidence, SelectTransferParams{.confidence = confidence.matrix<float>(),
                                                  .mask_index = mask_index.matrix<bool>(),
                                                  .length = length,
                                                  .block_length = block_length_of(kOp, block_length, length),
                                                  .order = order_of(kOp, order),
                                                  .num_transfer = expect_at_least(kOp, "num_transfer", num_transfer, 0),
                                                  .num_transfer_per_row = counts,
                                                  .has_threshold = threshold.has_value(),
                                                  .threshold = threshold_of(kOp, threshold),
                                                  .strict = strict,
                                                  .fallback = choose<Fallback>(kOp, "fallback", fallback,
                                                                               {"top", "top_if_fewer", "top_always"}),
                                                  .transfer_index = transfer_index.template data<bool>()});
    return transfer_index.release();
  }

  static std::tuple<Released, Released> build_drafts(const Tensor& input_ids_, const Tensor& token_ids_,
                                                     const Tensor& confidence_, int64_t mask_token_id,
                                                     int64_t draft_steps, int64_t tokens_per_step,
                                                     std::optional<double> threshold, const Word& order,
                                                     std::optional<int64_t> block_length) {
    constexpr const char* kOp = "build_drafts";
    const Argument input_ids = Edge::argument(kOp, "input_ids", input_ids_);
    const Argument token_ids = Edge::argument(kOp, "token_ids", token_ids_);
    const Argument confidence = Edge::argument(kOp, "confidence", confidence_);
    input_ids.expect({DType::kInt64}).expect_dims(2);
    token_ids.expect({DType::kInt64}).expect_shape_of(input_ids);
    confidence.expect({DType::kFloat32}).expect_shape_of(input_ids);
    expect_at_least(kOp, "draft_steps", draft_steps, 1);
    const int64_t batch = input_ids.sizes[0], length = expect_at_least(kOp, "L", length_of(input_ids), 1);
    const StepRule rule = step_rule(kOp, length, mask_token_id, tokens_per_step, threshold, order, block_length);

    Output drafts(DType::kInt64, input_ids, {batch, draft_steps, length});
    Output num_drafts(DType::kInt32, input_ids, {batch});
    Edge::launch(input_ids, BuildDraftsParams{.input_ids = input_ids.matrix<int64_t>(),
                                              .token_ids = token_ids.matrix<int64_t>(),
                                              .confidence = confidence.matrix<float>(),
                                              .length = length,
                                              .draft_steps = draft_steps,
                                              .rule = rule,
                                              .drafts = drafts.template data<int64_t>(),
                                              .num_drafts = num_drafts.template data<int32_t>()});
    return {drafts.release(), num_drafts.release()};
  }

  static Released verify_drafts(const Tensor& drafts_, const Tensor& targets_, const std::optional<Tensor>& num_drafts_,
                                const Word& match, std::optional<int64_t> mask_token_id) {
    constexpr const char* kOp = "verify_drafts";
    const Argument drafts = Edge::argument(kOp, "drafts", drafts_);
    const Argument targets = Edge::argument(kOp, "targets", targets_);
    drafts.expect({DType::kInt64}).expect_dims(3);
    targets.expect({DType::kInt64}).expect_shape_of(drafts);
    Counts counts{};
    if (num_drafts_) {
      const Argument num_drafts = Edge::argument(kOp, "num_drafts", *num_drafts_);
      counts = num_drafts.expect({DType::kInt32, DType::kInt64}).expect_shape_of(drafts, 1).counts();
    }
    const Match rule = match_of(kOp, match);
    STD_TORCH_CHECK(rule == Match::kExact || mask_token_id, kOp, ": match='subset' needs mask_token_id, got none");

    Output accepted(DType::kInt64, drafts, {drafts.sizes[0]});
    Edge::launch(drafts, VerifyDraftsParams{.drafts = drafts.matrix<int64_t>(),
                                            .targets = targets.matrix<int64_t>(),
                                            .batch = drafts.sizes[0],
                                            .draft_steps = expect_at_least(kOp, "K", drafts.sizes[1], 1),
                                            .length = expect_at_least(kOp, "L", length_of(drafts), 1),
                                            .num_drafts = counts,
                                            .match = rule,
                                            .mask_token_id = mask_token_id.value_or(0),
                                            .accepted = accepted.template data<int64_t>()});
    return accepted.release();
  }

  static Released draft_step(const Tensor& drafts_, const Tensor& token_ids_, const Tensor& confidence_,
                             const Tensor& num_drafts_, int64_t mask_token_id, int64_t draft_steps,
                             int64_t tokens_per_step, std::optional<double> threshold, const Word& order,
                             std::optional<int64_t> block_length, const Word& drafting, const Word& match,
                             std::optional<int64_t> eos_token_id, const std::optional<Tensor>& step_,
                             const std::optional<Tensor>& answer_start_) {
    constexpr const char* kOp = "draft_step";
    const Argument drafts = Edge::argument(kOp, "drafts", drafts_);
    const Argument token_ids = Edge::argument(kOp, "token_ids", token_ids_);
    const Argument confidence = Edge::argument(kOp, "confidence", confidence_);
    const Argument num_drafts = Edge::argument(kOp, "num_drafts", num_drafts_);
    drafts.expect({DType::kInt64}).expect_dims(3);
    token_ids.expect({DType::kInt64}).expect_shape_of(drafts);
    confidence.expect({DType::kFloat32}).expect_shape_of(drafts);
    num_drafts.expect({DType::kInt32, DType::kInt64}).expect_shape_of(drafts, 1);
    Counts taken{}, answer_start{};
    if (step_) {
      const Argument step = Edge::argument(kOp, "step", *step_);
      taken = step.expect({DType::kInt64}).expect_shape_of(drafts, 1).counts();
    }
    if (answer_start_) {
      const Argument start = Edge::argument(kOp, "answer_start", *answer_start_);
      answer_start = start.expect({DType::kInt64}).expect_shape_of(drafts, 1).counts();
    }
    const int64_t batch = drafts.sizes[0];
    const int64_t input_drafts = expect_at_least(kOp, "J", drafts.sizes[1], 1);
    const int64_t length = expect_at_least(kOp, "L", length_of(drafts), 1);
    expect_at_least(kOp, "draft_steps", draft_steps, 1);
    const StepRule rule = step_rule(kOp, length, mask_token_id, tokens_per_step, threshold, order, block_length);
    const Drafting how = choose<Drafting>(kOp, "drafting", drafting, {"recycled", "nested"});

    Output records(DType::kInt64, drafts, {batch, record_width(length, draft_steps)});
    Edge::launch(drafts, DraftStepParams{.drafts = drafts.matrix<int64_t>(),
                                         .token_ids = token_ids.matrix<int64_t>(),
                                         .confidence = confidence.matrix<float>(),
                                         .num_drafts = num_drafts.counts(),
                                         .step = taken,
                                         .answer_start = answer_start,
                                         .batch = batch,
                                         .input_drafts = input_drafts,
                                         .draft_steps = draft_steps,
                                         .length = length,
                                         .rule = rule,
                                         .drafting = how,
                                         .match = match_of(kOp, match),
                                         .has_eos_token_id = eos_token_id.has_value(),
                                         .eos_token_id = eos_token_id.value_or(0),
                                         .records = records.template data<int64_t>()});
    return records.release();
  }

 private:
  // The arguments that say which logits are to be looked at, checked.
  static LogitsToScan to_scan(const Argument& logits, const Argument& input_ids, int64_t mask_token_id,
                              int64_t first_token_id, const std::optional<Tensor>& mask_index_,
                              std::string_view measure, const std::optional<Tensor>& suppress_tokens_,
                              bool logits_shift) {
    const char* const op = logits.op;
    logits.expect({DType::kFloat32, DType::kBFloat16, DType::kFloat16});
    STD_TORCH_CHECK(logits.dims >= 2, op, ": logits must have at least 2 dimensions, got shape ", logits.shape());
    const int64_t vocab = logits.sizes[logits.dims - 1];
    STD_TORCH_CHECK(vocab >= 1, op, ": logits must have a vocabulary of at least 1, got shape ", logits.shape());
    STD_TORCH_CHECK(vocab == 1 || logits.strides[logits.dims - 1] == 1, op,
                    ": the vocabulary dimension of logits must be contiguous, got stride ",
                    logits.strides[logits.dims - 1]);
    input_ids.expect({DType::kInt64}).expect_shape_of(logits, logits.dims - 1);

    LogitsToScan p{.logits = logits.data,
                   .logit_rows = logits.rows(logits.dims - 1, 1),
                   .logit_type = logits.is(DType::kFloat32)    ? LogitType::kFloat32
                                 : logits.is(DType::kBFloat16) ? LogitType::kBFloat16
                                                               : LogitType::kFloat16,
                   .length = input_ids.sizes[input_ids.dims - 1],
                   .vocab = vocab,
                   .first_token_id = expect_at_least(op, "first_token_id", first_token_id, 0),
                   .logits_shift = logits_shift,
                   .input_ids = input_ids.matrix<int64_t>(),
                   .mask_index = no_matrix<bool>(),
                   .mask_token_id = mask_token_id,
                   .suppress_tokens = nullptr,
                   .num_suppress_tokens = 0,
                   .suppress_tokens_step = 0,
                   .measure = measure_of(op, measure)};
    if (mask_index_) {
      const Argument mask_index = Edge::argument(op, "mask_index", *mask_index_);
      p.mask_index = mask_index.expect({DType::kBool}).expect_shape_of(input_ids).matrix<bool>();
      // A tensor without elements may have no memory; nothing is read then, whatever the pointer says.
      static constexpr bool kNothing = false;
      if (p.mask_index.data == nullptr) p.mask_index.data = &kNothing;
    }
    if (suppress_tokens_) {
      const Argument suppress_tokens = Edge::argument(op, "suppress_tokens", *suppress_tokens_);
      suppress_tokens.expect({DType::kInt64}).expect_dims(1);
      STD_TORCH_CHECK(suppress_tokens.device_type == logits.device_type, op,
                      ": suppress_tokens must be on the device of logits");
      p.suppress_tokens = static_cast<const int64_t*>(suppress_tokens.data);
      p.num_suppress_tokens = suppress_tokens.sizes[0];
      p.suppress_tokens_step = suppress_tokens.strides[0];
    }
    return p;
  }
};

}  // namespace freedave
