// What a call of each op does: its arguments checked, its outputs made, its kernels started.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "freedave/build_drafts.h"
#include "freedave/draft_step.h"
#include "freedave/keep.h"
#include "freedave/logit_floor.h"
#include "freedave/pooled_step.h"
#include "freedave/predict_tokens.h"
#include "freedave/rank_positions.h"
#include "freedave/select_transfer.h"
#include "freedave/verify_drafts.h"
#include "torch/arguments.h"
#include "torch/devices.h"
#include "torch/outputs.h"
#include "torch/schemas.h"

namespace freedave {
namespace {

int64_t block_length_of(const char* op, OptionalInt block_length, int64_t length) {
  return block_length ? expect_at_least(op, "block_length", *block_length, 1) : length;
}

double threshold_of(const char* op, OptionalFloat threshold) {
  STD_TORCH_CHECK(!threshold || !std::isnan(*threshold), op, ": threshold must be a number, got nan");
  return threshold.value_or(0.0);
}

// For sequences that are the first dimension of `states`.
StepRules step_rules(const Argument& states, int64_t mask_token_id, int64_t tokens, const OptionalTensor& tokens_each,
                     OptionalFloat threshold, const OptionalTensor& threshold_each, const Text& rule, const Text& order,
                     OptionalInt block_length, OptionalInt eos = {}, const OptionalTensor& eos_each = {}) {
  const char* const op = states.op;
  const Counts limit = counts(op, "threshold_per_row", threshold_each, states, 1, kFloats);
  const Counts count = counts(op, "tokens_per_step_per_row", tokens_each, states, 1);
  const Counts end = counts(op, "eos_token_id_per_row", eos_each, states, 1);
  return {mask_token_id,
          block_length_of(op, block_length, states.length()),
          choose<Order>(op, "order", order),
          threshold || threshold_each,
          choose<Rule>(op, "rule", rule),
          {threshold_of(op, threshold), limit.data, limit.rows.stride[0], limit.is_32_bit},
          {expect_at_least(op, "tokens_per_step", tokens, 1), count.data, count.rows.stride[0], count.is_32_bit},
          {eos.value_or(-1), end.data, end.rows.stride[0], end.is_32_bit}};
}

// What logits [*, V] have one of a row, as rows of a length of 1, where the caller gave it: bool or float32.
template <typename T>
Matrix<const T> column_of(const Argument& logits, const char* name, const OptionalTensor& tensor) {
  if (!tensor) return {};
  const Argument column(logits.op, name, *tensor);
  column.expect({sizeof(T) == 1 ? ScalarType::Bool : ScalarType::Float}).expect_shape_of(logits, logits.dims - 1);
  return {static_cast<const T*>(column.data), column.rows(column.dims, 0)};
}

LogitType logit_type(const Argument& logits) {
  logits.expect({ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  if (logits.type == ScalarType::Float) return LogitType::kFloat32;
  return logits.type == ScalarType::BFloat16 ? LogitType::kBFloat16 : LogitType::kFloat16;
}

// The logits of an op's parameters, and which of them are left out.
template <typename Params>
void set_logits(Params& p, const Argument& logits, int64_t min_dims, const OptionalTensor& suppress_tokens_) {
  p.logit_type = logit_type(logits);
  const int64_t leading = logits.dims - 1;
  STD_TORCH_CHECK(logits.dims >= min_dims && logits.sizes[leading] >= 1, logits.op, ": logits must have at least ",
                  min_dims, " dimensions and a vocabulary of at least 1, got shape ", logits.shape());
  STD_TORCH_CHECK(logits.sizes[leading] == 1 || logits.strides[leading] == 1, logits.op,
                  ": the vocabulary dimension of logits must be contiguous, got stride ", logits.strides[leading]);
  p.logits = logits.data;
  p.logit_rows = logits.rows(leading, 1);
  p.vocab = logits.sizes[leading];
  if (!suppress_tokens_) return;
  const Argument suppress_tokens(logits.op, "suppress_tokens", *suppress_tokens_);
  suppress_tokens.expect({ScalarType::Long}).expect_dims(1).expect_device_of(logits);
  p.suppress_tokens = static_cast<const int64_t*>(suppress_tokens.data);
  p.num_suppress_tokens = suppress_tokens.sizes[0];
  p.suppress_tokens_step = suppress_tokens.strides[0];
}

// The arguments that say which logits are to be looked at.
LogitsToScan to_scan(const Argument& logits, const Argument& input_ids, int64_t mask_token_id, int64_t first_token_id,
                     const OptionalTensor& mask_index, const Text& measure, const OptionalTensor& suppress_tokens,
                     bool logits_shift, const OptionalTensor& temperature, const OptionalTensor& seed,
                     const OptionalTensor& positions, const OptionalTensor& floor) {
  LogitsToScan p{};
  set_logits(p, logits, 2, suppress_tokens);
  input_ids.expect({ScalarType::Long}).expect_shape_of(logits, logits.dims - 1);
  p.length = input_ids.sizes[input_ids.dims - 1];
  p.first_token_id = expect_at_least(logits.op, "first_token_id", first_token_id, 0);
  p.logits_shift = logits_shift;
  p.input_ids = input_ids.matrix<int64_t>();
  p.mask_index = matrix_of<bool>(input_ids, "mask_index", mask_index);
  p.mask_token_id = mask_token_id;
  p.measure = choose<Measure>(logits.op, "measure", measure);
  p.temperature = matrix_of<float>(input_ids, "temperature", temperature);
  p.seed = matrix_of<int64_t>(input_ids, "seed", seed);
  p.position = matrix_of<int64_t>(input_ids, "positions", positions);
  p.floor = matrix_of<float>(input_ids, "floor", floor);
  STD_TORCH_CHECK(
      !temperature || (seed && positions && measures_draws(p.measure) && first_token_id % 4 == 0), logits.op,
      ": a temperature needs seed, positions, a measure of the drawn token, and a multiple of 4 as first token");
  return p;
}

std::tuple<Tensor, Tensor, Tensor> predict_tokens(const Tensor& logits_, const Tensor& input_ids_,
                                                  int64_t mask_token_id, const OptionalTensor& mask_index,
                                                  const Text& measure, const OptionalTensor& suppress_tokens,
                                                  bool logits_shift, const OptionalTensor& temperature,
                                                  const OptionalTensor& seed, const OptionalTensor& positions,
                                                  const OptionalTensor& floor, const OptionalTensor& scored_ids,
                                                  const Text& suppress) {
  const Argument logits("predict_tokens", "logits", logits_), input_ids("predict_tokens", "input_ids", input_ids_);
  const LogitsToScan scan = to_scan(logits, input_ids, mask_token_id, 0, mask_index, measure, suppress_tokens,
                                    logits_shift, temperature, seed, positions, floor);
  Tensor token_ids = new_tensor_like(input_ids, ScalarType::Long);
  Tensor confidence = new_tensor_like(input_ids, ScalarType::Float);
  Tensor log_probs = new_tensor_like(input_ids, ScalarType::Float, scored_ids.has_value());
  launch(logits, PredictTokensParams{scan, choose<Suppress>(logits.op, "suppress", suppress),
                                     matrix_of<int64_t>(input_ids, "scored_ids", scored_ids), data<int64_t>(token_ids),
                                     data<float>(confidence), data<float>(log_probs)});
  return {token_ids, confidence, log_probs};
}

Tensor partial_predictions(const Tensor& logits_, const Tensor& input_ids_, int64_t mask_token_id,
                           int64_t first_token_id, const OptionalTensor& mask_index, const Text& measure,
                           const OptionalTensor& suppress_tokens, bool logits_shift, const OptionalTensor& temperature,
                           const OptionalTensor& seed, const OptionalTensor& positions, const OptionalTensor& floor) {
  constexpr const char* kOp = "partial_predictions";
  const Argument logits(kOp, "logits", logits_), input_ids(kOp, "input_ids", input_ids_);
  const LogitsToScan scan = to_scan(logits, input_ids, mask_token_id, first_token_id, mask_index, measure,
                                    suppress_tokens, logits_shift, temperature, seed, positions, floor);
  STD_TORCH_CHECK(first_token_id <= kTokenIds - scan.vocab, kOp, ": token ids must lie below 2^53, got ", scan.vocab,
                  " from first_token_id ", first_token_id);
  std::vector<int64_t> sizes(input_ids.sizes, input_ids.sizes + input_ids.dims);
  sizes.insert(sizes.end(), {chunks_of(scan.vocab, kTokensPerState), kStateFields});
  Tensor states = new_tensor(input_ids, ScalarType::Double, sizes);
  launch(logits, PartialPredictionsParams{scan, data<double>(states)});
  return states;
}

std::tuple<Tensor, Tensor, Tensor> merge_predictions(const Tensor& states_, const Tensor& input_ids_,
                                                     const Text& measure, bool drawn) {
  constexpr const char* kOp = "merge_predictions";
  const Argument states(kOp, "states", states_), input_ids(kOp, "input_ids", input_ids_);
  const int64_t leading = states.expect({ScalarType::Double}).dims - 2;
  STD_TORCH_CHECK(leading >= 1 && states.sizes[leading] >= 1 && states.sizes[leading + 1] >= kStateFields &&
                      states.strides[leading + 1] == 1,
                  kOp, ": states must have shape [*, L, C, ", kStateFields, " or more], the last contiguous, got ",
                  states.shape());
  input_ids.expect({ScalarType::Long}).expect_shape_of(states, leading);
  const int64_t singles = states.sizes[leading + 1] - kStateFields;
  Tensor token_ids = new_tensor_like(input_ids, ScalarType::Long);
  Tensor confidence = new_tensor_like(input_ids, ScalarType::Float);
  Tensor log_probs = new_tensor_like(input_ids, ScalarType::Float, singles > 0);
  launch(states,
         MergePredictionsParams{static_cast<const double*>(states.data), states.rows(leading, states.strides[leading]),
                                states.sizes[leading], input_ids.sizes[leading - 1], input_ids.matrix<int64_t>(),
                                choose<Measure>(kOp, "measure", measure), drawn, singles, data<int64_t>(token_ids),
                                data<float>(confidence), data<float>(log_probs)});
  return {token_ids, confidence, log_probs};
}

Tensor logit_floor(const Tensor& logits_, OptionalInt top_k, OptionalFloat top_p, OptionalFloat min_p,
                   const OptionalTensor& temperature, const OptionalTensor& mask_index,
                   const OptionalTensor& suppress_tokens) {
  const Argument logits("logit_floor", "logits", logits_);
  LogitFloorParams p{};
  set_logits(p, logits, 1, suppress_tokens);
  STD_TORCH_CHECK(p.vocab <= kMostSummedTokens, logits.op, ": logits must have at most ", kMostSummedTokens,
                  " tokens, got ", p.vocab);
  p.mask_index = column_of<bool>(logits, "mask_index", mask_index);
  p.temperature = column_of<float>(logits, "temperature", temperature);
  p.top_k = expect_at_least(logits.op, "top_k", top_k.value_or(p.vocab), 1);
  p.top_p = top_p.value_or(1.0);
  p.least_difference = min_p ? static_cast<float>(std::log(*min_p)) : -INFINITY;
  STD_TORCH_CHECK(p.top_p > 0.0, logits.op, ": top_p must be above 0");
  Tensor floor = new_tensor(logits, ScalarType::Float, {logits.sizes, static_cast<size_t>(logits.dims - 1)});
  p.floor = data<float>(floor);
  launch(logits, p);
  return floor;
}

Tensor rank_positions(const Tensor& confidence_, const Tensor& mask_index, const Text& order,
                      OptionalInt block_length) {
  constexpr const char* kOp = "rank_positions";
  const Argument confidence(kOp, "confidence", confidence_);
  const int64_t length = confidence.expect({ScalarType::Float}).length();
  expect_served(confidence, length);

  Tensor rank = new_tensor_like(confidence, ScalarType::Int);
  launch(confidence,
         RankPositionsParams{confidence.matrix<float>(), matrix_of<bool>(confidence, "mask_index", mask_index), length,
                             block_length_of(kOp, block_length, length), choose<Order>(kOp, "order", order),
                             data<int32_t>(rank)});
  return rank;
}

Tensor select_transfer(const Tensor& confidence_, const Tensor& mask_index, int64_t num_transfer,
                       const OptionalTensor& counts_each, OptionalFloat threshold, const OptionalTensor& limits_each,
                       const Text& rule, const Text& fallback, const Text& order, OptionalInt block_length) {
  constexpr const char* kOp = "select_transfer";
  const Argument confidence(kOp, "confidence", confidence_);
  const int64_t length = confidence.expect({ScalarType::Float}).length(), rows = confidence.dims - 1;
  expect_served(confidence, length);

  Tensor transfer_index = new_tensor_like(confidence, ScalarType::Bool);
  launch(confidence, SelectTransferParams{
                         .confidence = confidence.matrix<float>(),
                         .mask_index = matrix_of<bool>(confidence, "mask_index", mask_index),
                         .length = length,
                         .block_length = block_length_of(kOp, block_length, length),
                         .order = choose<Order>(kOp, "order", order),
                         .num_transfer = expect_at_least(kOp, "num_transfer", num_transfer, 0),
                         .num_transfer_per_row = counts(kOp, "num_transfer_per_row", counts_each, confidence, rows),
                         .has_threshold = threshold || limits_each,
                         .threshold = threshold_of(kOp, threshold),
                         .threshold_per_row = counts(kOp, "threshold_per_row", limits_each, confidence, rows, kFloats),
                         .rule = choose<Rule>(kOp, "rule", rule),
                         .fallback = choose<Fallback>(kOp, "fallback", fallback),
                         .transfer_index = data<bool>(transfer_index)});
  return transfer_index;
}

std::tuple<Tensor, Tensor> build_drafts(const Tensor& input_ids_, const Tensor& token_ids, const Tensor& confidence,
                                        int64_t mask_token_id, int64_t draft_steps, int64_t tokens,
                                        const OptionalTensor& tokens_each, OptionalFloat limit,
                                        const OptionalTensor& limit_each, const Text& rule, const Text& order,
                                        OptionalInt block_length) {
  constexpr const char* kOp = "build_drafts";
  const Argument input_ids(kOp, "input_ids", input_ids_);
  input_ids.expect({ScalarType::Long}).expect_dims(2);
  expect_at_least(kOp, "draft_steps", draft_steps, 1);
  const int64_t batch = input_ids.sizes[0], length = expect_at_least(kOp, "L", input_ids.length(), 1);
  const StepRules rules =
      step_rules(input_ids, mask_token_id, tokens, tokens_each, limit, limit_each, rule, order, block_length);
  expect_served(input_ids, length, draft_steps);

  Tensor drafts = new_tensor(input_ids, ScalarType::Long, {batch, draft_steps, length});
  Tensor num_drafts = new_tensor(input_ids, ScalarType::Int, {batch});
  launch(input_ids,
         BuildDraftsParams{input_ids.matrix<int64_t>(), matrix_of<int64_t>(input_ids, "token_ids", token_ids),
                           matrix_of<float>(input_ids, "confidence", confidence), length, draft_steps, rules,
                           data<int64_t>(drafts), data<int32_t>(num_drafts)});
  return {drafts, num_drafts};
}

Tensor verify_drafts(const Tensor& drafts_, const Tensor& targets, const OptionalTensor& num_drafts, const Text& match,
                     OptionalInt mask_token_id) {
  constexpr const char* kOp = "verify_drafts";
  const Argument drafts(kOp, "drafts", drafts_);
  drafts.expect({ScalarType::Long}).expect_dims(3);
  const int64_t batch = drafts.sizes[0], draft_steps = expect_at_least(kOp, "K", drafts.sizes[1], 1);
  const int64_t length = expect_at_least(kOp, "L", drafts.length(), 1);
  const Counts active = counts(kOp, "num_drafts", num_drafts, drafts, 1);
  const Match rule = choose<Match>(kOp, "match", match);
  STD_TORCH_CHECK(rule == Match::kExact || mask_token_id, kOp, ": match='subset' needs mask_token_id, got none");
  expect_served(drafts, length, draft_steps);

  Tensor accepted = new_tensor(drafts, ScalarType::Long, {batch});
  launch(drafts,
         VerifyDraftsParams{drafts.matrix<int64_t>(), matrix_of<int64_t>(drafts, "targets", targets), batch,
                            draft_steps, length, active, rule, mask_token_id.value_or(0), data<int64_t>(accepted)});
  return accepted;
}

// What both steps take. The records are still to be made.
DraftStepParams draft_step_params(const Argument& drafts, const Tensor& token_ids, const Tensor& confidence,
                                  const Tensor& num_drafts, int64_t draft_steps, const StepRules& rules,
                                  const OptionalTensor& step, const OptionalTensor& answer_start) {
  const char* const op = drafts.op;
  return {.drafts = drafts.matrix<int64_t>(),
          .token_ids = matrix_of<int64_t>(drafts, "token_ids", token_ids),
          .confidence = matrix_of<float>(drafts, "confidence", confidence),
          .num_drafts = counts(op, "num_drafts", num_drafts, drafts, 1),
          .step = counts(op, "step", step, drafts, 1),
          .answer_start = counts(op, "answer_start", answer_start, drafts, 1),
          .batch = drafts.sizes[0],
          .input_drafts = drafts.sizes[1],
          .draft_steps = expect_at_least(op, "draft_steps", draft_steps, 1),
          .length = drafts.sizes[2],
          .rules = rules};
}

int64_t expect_drafts(const Argument& drafts) {
  drafts.expect({ScalarType::Long}).expect_dims(3);
  expect_at_least(drafts.op, "J", drafts.sizes[1], 1);
  return expect_at_least(drafts.op, "L", drafts.length(), 1);
}

Tensor draft_step(const Tensor& drafts_, const Tensor& token_ids, const Tensor& confidence, const Tensor& num_drafts,
                  int64_t mask_token_id, int64_t draft_steps, int64_t tokens, const OptionalTensor& tokens_each,
                  OptionalFloat limit, const OptionalTensor& limit_each, const Text& rule, const Text& order,
                  OptionalInt block_length, const Text& drafting, const Text& match, OptionalInt eos,
                  const OptionalTensor& eos_each, const OptionalTensor& step, const OptionalTensor& answer_start) {
  constexpr const char* kOp = "draft_step";
  const Argument drafts(kOp, "drafts", drafts_);
  const int64_t length = expect_drafts(drafts);
  const StepRules rules = step_rules(drafts, mask_token_id, tokens, tokens_each, limit, limit_each, rule, order,
                                     block_length, eos, eos_each);
  DraftStepParams p =
      draft_step_params(drafts, token_ids, confidence, num_drafts, draft_steps, rules, step, answer_start);
  p.drafting = choose<Drafting>(kOp, "drafting", drafting);
  p.match = choose<Match>(kOp, "match", match);
  expect_served(drafts, length, std::max(p.input_drafts, draft_steps));

  Tensor records = new_tensor(drafts, ScalarType::Long, {p.batch, record_width(length, draft_steps)});
  p.records = data<int64_t>(records);
  launch(drafts, p);
  return records;
}

void keep(const Tensor& window_key, const Tensor& window_value, const Tensor& accepted, const Tensor& start,
          const Tensor& count, const Tensor& key, const Tensor& value, const OptionalTensor& slots) {
  constexpr const char* kOp = "keep";
  const Argument windows[] = {{kOp, "window_key", window_key}, {kOp, "window_value", window_value}};
  const Argument stored[] = {{kOp, "stored_key", key}, {kOp, "stored_value", value}};
  logit_type(windows[0].expect_dims(6));
  const int64_t *n = windows[0].sizes, *s = stored[0].expect_dims(5).sizes, bytes = key.element_size();
  STD_TORCH_CHECK(s[0] == n[0] && (slots || s[1] == n[1]) && s[3] == n[4] && s[4] == n[5], kOp,
                  ": stored_key must have shape [N, S, C, G, D], with S = B where slots is None, for window_key ",
                  windows[0].shape(), ", got ", stored[0].shape());
  stored[0].expect_device_of(windows[0]);
  Argument layer = windows[0];
  layer.name = "a layer of window_key";
  ++layer.sizes, --layer.dims;
  KeepParams p{{n[0], n[1], n[2], n[3], n[4], n[5] * bytes, s[1], s[2]},
               counts(kOp, "accepted", accepted, layer, 1),
               counts(kOp, "start", start, layer, 1),
               counts(kOp, "count", count, layer, 1),
               counts(kOp, "slots", slots, layer, 1),
               {}};
  for (int i = 0; i < 2; ++i) {
    const Argument &from = windows[i], &to = stored[i];
    from.expect({windows[0].type}).expect_shape_of(windows[0]);
    to.expect({windows[0].type}).expect_shape_of(stored[0]);
    STD_TORCH_CHECK(n[5] <= 1 || (from.strides[5] == 1 && to.strides[4] == 1), kOp, ": the last dimensions of ",
                    from.name, " and ", to.name, " must be contiguous");
    p.features[i] = kept_features(from.data, from.strides, data<char>(i == 0 ? key : value), to.strides, bytes);
  }
  launch(windows[0], p);
}

Tensor pooled_step(const Tensor& drafts_, const Tensor& token_ids, const Tensor& confidence, const Tensor& num_drafts,
                   const Tensor& pool_, int64_t pool_states, int64_t pool_length, int64_t mask_token_id,
                   int64_t draft_steps, int64_t tokens, const OptionalTensor& tokens_each, OptionalFloat limit,
                   const OptionalTensor& limit_each, const Text& rule, const Text& order, OptionalInt block_length,
                   const Text& drafting, OptionalInt eos, const OptionalTensor& eos_each, const OptionalTensor& step,
                   const OptionalTensor& answer_start, const OptionalTensor& window_start,
                   const OptionalTensor& computed_length, const OptionalTensor& slots, const OptionalTensor& forget) {
  constexpr const char* kOp = "pooled_step";
  const Argument drafts(kOp, "drafts", drafts_), pool(kOp, "pool", pool_);
  const int64_t length = expect_drafts(drafts), batch = drafts.sizes[0];
  const StepRules rules = step_rules(drafts, mask_token_id, tokens, tokens_each, limit, limit_each, rule, order,
                                     block_length, eos, eos_each);
  pool.expect({ScalarType::Long}).expect_dims(2).expect_device_of(drafts);
  expect_at_least(kOp, "pool_states", pool_states, 1);
  expect_at_least(kOp, "pool_length", pool_length, length);
  const int64_t width = pool_width(pool_states, pool_length);
  STD_TORCH_CHECK(pool.sizes[1] == width && pool_.is_contiguous(), kOp, ": pool must be contiguous, of shape [S, ",
                  width, "], got ", pool.shape());
  STD_TORCH_CHECK(slots ? pool.sizes[0] >= 1 || batch == 0 : pool.sizes[0] == batch, kOp,
                  ": pool must have a slot for each of ", batch, " sequences, got ", pool.shape());
  PooledStepParams p{
      .step = draft_step_params(drafts, token_ids, confidence, num_drafts, draft_steps, rules, step, answer_start),
      .pools = data<int64_t>(pool_),
      .pool_slots = pool.sizes[0],
      .pool_entries = pool_states,
      .pool_columns = pool_length,
      .drafting = choose<PooledDrafting>(kOp, "drafting", drafting),
      .window_start = counts(kOp, "window_start", window_start, drafts, 1),
      .computed_length = matrix_of<int64_t>(drafts, "computed_length", computed_length, 2),
      .slots = counts(kOp, "slots", slots, drafts, 1),
      .forget = matrix_of<bool>(drafts, "forget", forget, 1)};
  expect_served(drafts, pool_length, std::max(p.step.input_drafts, draft_steps), pool_states);

  Tensor records = new_tensor(drafts, ScalarType::Long, {batch, record_width(length, draft_steps)});
  p.step.records = data<int64_t>(records);
  launch(drafts, p);
  return records;
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("predict_tokens", TORCH_BOX(&predict_tokens));
  m.impl("partial_predictions", TORCH_BOX(&partial_predictions));
  m.impl("merge_predictions", TORCH_BOX(&merge_predictions));
  m.impl("logit_floor", TORCH_BOX(&logit_floor));
  m.impl("rank_positions", TORCH_BOX(&rank_positions));
  m.impl("select_transfer", TORCH_BOX(&select_transfer));
  m.impl("build_drafts", TORCH_BOX(&build_drafts));
  m.impl("verify_drafts", TORCH_BOX(&verify_drafts));
  m.impl("draft_step", TORCH_BOX(&draft_step));
  m.impl("pooled_step", TORCH_BOX(&pooled_step));
  m.impl("keep", TORCH_BOX(&keep));
}

}  // namespace

#if FREEDAVE_EMULATED
STABLE_TORCH_LIBRARY(freedave_emulated, m) {
  for (const char* schema : kSchemas) m.def(schema);
}
STABLE_TORCH_LIBRARY_IMPL(freedave_emulated, CPU, m) { implement(m); }
#else
STABLE_TORCH_LIBRARY(freedave, m) {
  for (const char* schema : kSchemas) m.def(schema);
}
STABLE_TORCH_LIBRARY_IMPL(freedave, CPU, m) { implement(m); }
#if FREEDAVE_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(freedave, CUDA, m) { implement(m); }
#endif
#endif

}  // namespace freedave

#if FREEDAVE_HAS_CUDA && !FREEDAVE_EMULATED
// Whether the kernels can find the streams of the torch that loaded this library. For checks without a GPU.
extern "C" __attribute__((visibility("default"))) bool freedave_finds_cuda_streams() {
  return freedave::current_stream() != nullptr;
}
#endif
