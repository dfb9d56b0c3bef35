// The ops as torch sees them: schemas, argument checks, outputs, and which launcher serves which device. With
// tensors.h and devices.h, the only file that knows tensors.
//
// The Python wrappers explain a wrong argument at length; the checks here make a raw torch.ops call memory-safe.
#include <cmath>
#include <optional>
#include <tuple>

#include "devices.h"
#include "tensors.h"

namespace freedave {
namespace {

Order order_of(const char* op, const Word& order) {
  return choose<Order>(op, "order", order, {"confidence", "left_to_right"});
}
Match match_of(const char* op, const Word& match) { return choose<Match>(op, "match", match, {"exact", "subset"}); }

// Positions are sorted as 32-bit numbers.
int64_t length_of(const Argument& tensor) {
  const int64_t length = tensor.sizes[tensor.dims - 1];
  STD_TORCH_CHECK(length <= INT32_MAX, tensor.op, ": ", tensor.name, " must have fewer than 2^31 positions, got shape ",
                  tensor.shape());
  return length;
}

int64_t block_length_of(const char* op, std::optional<int64_t> block_length, int64_t length) {
  return block_length ? expect_at_least(op, "block_length", *block_length, 1) : length;
}

float threshold_of(const char* op, std::optional<double> threshold) {
  STD_TORCH_CHECK(!threshold || !std::isnan(*threshold), op, ": threshold must be a number, got nan");
  return static_cast<float>(threshold.value_or(0.0));
}

StepRule step_rule(const char* op, int64_t length, int64_t mask_token_id, int64_t tokens_per_step,
                   std::optional<double> threshold, const Word& order, std::optional<int64_t> block_length) {
  return {.mask_token_id = mask_token_id,
          .tokens_per_step = expect_at_least(op, "tokens_per_step", tokens_per_step, 1),
          .block_length = block_length_of(op, block_length, length),
          .has_threshold = threshold.has_value(),
          .threshold = threshold_of(op, threshold),
          .order = order_of(op, order)};
}

template <typename Device>
std::tuple<Released, Released> predict_tokens(const Tensor& logits_, const Tensor& input_ids_, int64_t mask_token_id,
                                              const std::optional<Tensor>& mask_index_, const Word& measure,
                                              const std::optional<Tensor>& suppress_tokens_, bool logits_shift) {
  constexpr const char* kOp = "predict_tokens";
  const Argument logits(kOp, "logits", logits_);
  logits.expect({DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  STD_TORCH_CHECK(logits.dims >= 2, kOp, ": logits must have at least 2 dimensions, got shape ", logits.shape());
  const int64_t vocab = logits.sizes[logits.dims - 1];
  STD_TORCH_CHECK(vocab >= 1, kOp, ": logits must have a vocabulary of at least 1, got shape ", logits.shape());
  STD_TORCH_CHECK(vocab == 1 || logits.strides[logits.dims - 1] == 1, kOp,
                  ": the vocabulary dimension of logits must be contiguous, got stride ",
                  logits.strides[logits.dims - 1]);
  const Argument input_ids(kOp, "input_ids", input_ids_);
  input_ids.expect({DType::kInt64}).expect_shape_of(logits, logits.dims - 1);

  PredictTokensParams p{.logits = logits.data,
                        .logit_rows = logits.rows(logits.dims - 1, 1),
                        .logit_type = logits.is(DType::kFloat32)    ? LogitType::kFloat32
                                      : logits.is(DType::kBFloat16) ? LogitType::kBFloat16
                                                                    : LogitType::kFloat16,
                        .length = input_ids.sizes[input_ids.dims - 1],
                        .vocab = vocab,
                        .logits_shift = logits_shift,
                        .input_ids = input_ids.matrix<int64_t>(),
                        .mask_index = no_matrix<bool>(),
                        .mask_token_id = mask_token_id,
                        .suppress_tokens = nullptr,
                        .num_suppress_tokens = 0,
                        .suppress_tokens_step = 0,
                        .measure = choose<Measure>(kOp, "measure", measure, {"prob", "margin", "neg_entropy"}),
                        .token_ids = nullptr,
                        .confidence = nullptr};
  if (mask_index_) {
    const Argument mask_index(kOp, "mask_index", *mask_index_);
    p.mask_index = mask_index.expect({DType::kBool}).expect_shape_of(input_ids).matrix<bool>();
    // A tensor without elements may have no memory; nothing is read then, whatever the pointer says.
    if (p.mask_index.data == nullptr) p.mask_index.data = static_cast<const bool*>(static_cast<const void*>(&p));
  }
  if (suppress_tokens_) {
    const Argument suppress_tokens(kOp, "suppress_tokens", *suppress_tokens_);
    suppress_tokens.expect({DType::kInt64}).expect_dims(1);
    STD_TORCH_CHECK(suppress_tokens.device_type == logits.device_type, kOp,
                    ": suppress_tokens must be on the device of logits");
    p.suppress_tokens = static_cast<const int64_t*>(suppress_tokens.data);
    p.num_suppress_tokens = suppress_tokens.sizes[0];
    p.suppress_tokens_step = suppress_tokens.strides[0];
  }

  Output token_ids(DType::kInt64, input_ids), confidence(DType::kFloat32, input_ids);
  p.token_ids = token_ids.data<int64_t>();
  p.confidence = confidence.data<float>();
  Device::launch(logits, p);
  return {token_ids.release(), confidence.release()};
}

template <typename Device>
Released rank_positions(const Tensor& confidence_, const Tensor& mask_index_, const Word& order,
                        std::optional<int64_t> block_length) {
  constexpr const char* kOp = "rank_positions";
  const Argument confidence(kOp, "confidence", confidence_);
  const Argument mask_index(kOp, "mask_index", mask_index_);
  confidence.expect({DType::kFloat32});
  STD_TORCH_CHECK(confidence.dims >= 1, kOp, ": confidence must have at least 1 dimension");
  mask_index.expect({DType::kBool}).expect_shape_of(confidence);
  const int64_t length = length_of(confidence);

  Output rank(DType::kInt32, confidence);
  Device::launch(confidence, RankPositionsParams{.confidence = confidence.matrix<float>(),
                                                 .mask_index = mask_index.matrix<bool>(),
                                                 .length = length,
                                                 .block_length = block_length_of(kOp, block_length, length),
                                                 .order = order_of(kOp, order),
                                                 .rank = rank.data<int32_t>()});
  return rank.release();
}

template <typename Device>
Released select_transfer(const Tensor& confidence_, const Tensor& mask_index_, int64_t num_transfer,
                         const std::optional<Tensor>& num_transfer_per_row_, std::optional<double> threshold,
                         bool strict, const Word& fallback, const Word& order, std::optional<int64_t> block_length) {
  constexpr const char* kOp = "select_transfer";
  const Argument confidence(kOp, "confidence", confidence_);
  const Argument mask_index(kOp, "mask_index", mask_index_);
  confidence.expect({DType::kFloat32});
  STD_TORCH_CHECK(confidence.dims >= 1, kOp, ": confidence must have at least 1 dimension");
  mask_index.expect({DType::kBool}).expect_shape_of(confidence);
  const int64_t length = length_of(confidence);
  Counts counts{};
  if (num_transfer_per_row_) {
    const Argument per_row(kOp, "num_transfer_per_row", *num_transfer_per_row_);
    counts = per_row.expect({DType::kInt32, DType::kInt64}).expect_shape_of(confidence, confidence.dims - 1).counts();
  }

  Output transfer_index(DType::kBool, confidence);
  Device::launch(confidence, SelectTransferParams{.confidence = confidence.matrix<float>(),
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
                                                  .transfer_index = transfer_index.data<bool>()});
  return transfer_index.release();
}

template <typename Device>
std::tuple<Released, Released> build_drafts(const Tensor& input_ids_, const Tensor& token_ids_,
                                            const Tensor& confidence_, int64_t mask_token_id, int64_t draft_steps,
                                            int64_t tokens_per_step, std::optional<double> threshold, const Word& order,
                                            std::optional<int64_t> block_length) {
  constexpr const char* kOp = "build_drafts";
  const Argument input_ids(kOp, "input_ids", input_ids_);
  const Argument token_ids(kOp, "token_ids", token_ids_);
  const Argument confidence(kOp, "confidence", confidence_);
  input_ids.expect({DType::kInt64}).expect_dims(2);
  token_ids.expect({DType::kInt64}).expect_shape_of(input_ids);
  confidence.expect({DType::kFloat32}).expect_shape_of(input_ids);
  expect_at_least(kOp, "draft_steps", draft_steps, 1);
  const int64_t batch = input_ids.sizes[0], length = expect_at_least(kOp, "L", length_of(input_ids), 1);
  const StepRule rule = step_rule(kOp, length, mask_token_id, tokens_per_step, threshold, order, block_length);

  Output drafts(DType::kInt64, input_ids, {batch, draft_steps, length});
  Output num_drafts(DType::kInt32, input_ids, {batch});
  Device::launch(input_ids, BuildDraftsParams{.input_ids = input_ids.matrix<int64_t>(),
                                              .token_ids = token_ids.matrix<int64_t>(),
                                              .confidence = confidence.matrix<float>(),
                                              .length = length,
                                              .draft_steps = draft_steps,
                                              .rule = rule,
                                              .drafts = drafts.data<int64_t>(),
                                              .num_drafts = num_drafts.data<int32_t>()});
  return {drafts.release(), num_drafts.release()};
}

template <typename Device>
Released verify_drafts(const Tensor& drafts_, const Tensor& targets_, const std::optional<Tensor>& num_drafts_,
                       const Word& match, std::optional<int64_t> mask_token_id) {
  constexpr const char* kOp = "verify_drafts";
  const Argument drafts(kOp, "drafts", drafts_);
  const Argument targets(kOp, "targets", targets_);
  drafts.expect({DType::kInt64}).expect_dims(3);
  targets.expect({DType::kInt64}).expect_shape_of(drafts);
  Counts counts{};
  if (num_drafts_) {
    const Argument num_drafts(kOp, "num_drafts", *num_drafts_);
    counts = num_drafts.expect({DType::kInt32, DType::kInt64}).expect_shape_of(drafts, 1).counts();
  }
  const Match rule = match_of(kOp, match);
  STD_TORCH_CHECK(rule == Match::kExact || mask_token_id, kOp, ": match='subset' needs mask_token_id, got none");

  Output accepted(DType::kInt64, drafts, {drafts.sizes[0]});
  Device::launch(drafts, VerifyDraftsParams{.drafts = drafts.matrix<int64_t>(),
                                            .targets = targets.matrix<int64_t>(),
                                            .batch = drafts.sizes[0],
                                            .draft_steps = expect_at_least(kOp, "K", drafts.sizes[1], 1),
                                            .length = expect_at_least(kOp, "L", length_of(drafts), 1),
                                            .num_drafts = counts,
                                            .match = rule,
                                            .mask_token_id = mask_token_id.value_or(0),
                                            .accepted = accepted.data<int64_t>()});
  return accepted.release();
}

template <typename Device>
std::tuple<Released, Released, Released> draft_step(const Tensor& drafts_, const Tensor& token_ids_,
                                                    const Tensor& confidence_, const Tensor& num_drafts_,
                                                    int64_t mask_token_id, int64_t draft_steps, int64_t tokens_per_step,
                                                    std::optional<double> threshold, const Word& order,
                                                    std::optional<int64_t> block_length, const Word& drafting,
                                                    const Word& match, std::optional<int64_t> eos_token_id,
                                                    const std::optional<Tensor>& step_) {
  constexpr const char* kOp = "draft_step";
  const Argument drafts(kOp, "drafts", drafts_);
  const Argument token_ids(kOp, "token_ids", token_ids_);
  const Argument confidence(kOp, "confidence", confidence_);
  const Argument num_drafts(kOp, "num_drafts", num_drafts_);
  drafts.expect({DType::kInt64}).expect_dims(3);
  token_ids.expect({DType::kInt64}).expect_shape_of(drafts);
  confidence.expect({DType::kFloat32}).expect_shape_of(drafts);
  num_drafts.expect({DType::kInt32, DType::kInt64}).expect_shape_of(drafts, 1);
  Counts taken{};
  if (step_) {
    const Argument step(kOp, "step", *step_);
    taken = step.expect({DType::kInt64}).expect_shape_of(drafts, 1).counts();
  }
  const int64_t batch = drafts.sizes[0];
  const int64_t input_drafts = expect_at_least(kOp, "J", drafts.sizes[1], 1);
  const int64_t length = expect_at_least(kOp, "L", length_of(drafts), 1);
  expect_at_least(kOp, "draft_steps", draft_steps, 1);
  const StepRule rule = step_rule(kOp, length, mask_token_id, tokens_per_step, threshold, order, block_length);
  const Drafting how = choose<Drafting>(kOp, "drafting", drafting, {"recycled", "nested"});

  Output next_drafts(DType::kInt64, drafts, {batch, draft_steps, length});
  Output next_confidence(DType::kFloat32, drafts, {batch, length});
  Output record(DType::kInt64, drafts, {batch, record_width(length)});
  Device::launch(drafts, DraftStepParams{.drafts = drafts.matrix<int64_t>(),
                                         .token_ids = token_ids.matrix<int64_t>(),
                                         .confidence = confidence.matrix<float>(),
                                         .num_drafts = num_drafts.counts(),
                                         .step = taken,
                                         .batch = batch,
                                         .input_drafts = input_drafts,
                                         .draft_steps = draft_steps,
                                         .length = length,
                                         .rule = rule,
                                         .drafting = how,
                                         .match = match_of(kOp, match),
                                         .has_eos_token_id = eos_token_id.has_value(),
                                         .eos_token_id = eos_token_id.value_or(0),
                                         .next_drafts = next_drafts.data<int64_t>(),
                                         .next_confidence = next_confidence.data<float>(),
                                         .record = record.data<int64_t>()});
  return {next_drafts.release(), next_confidence.release(), record.release()};
}

template <typename Device>
void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("predict_tokens", TORCH_BOX(&predict_tokens<Device>));
  m.impl("rank_positions", TORCH_BOX(&rank_positions<Device>));
  m.impl("select_transfer", TORCH_BOX(&select_transfer<Device>));
  m.impl("build_drafts", TORCH_BOX(&build_drafts<Device>));
  m.impl("verify_drafts", TORCH_BOX(&verify_drafts<Device>));
  m.impl("draft_step", TORCH_BOX(&draft_step<Device>));
}

}  // namespace

// Tests run the CUDA kernels on CPU tensors, as a library beside this one.
#if defined(FREEDAVE_EMULATED)
STABLE_TORCH_LIBRARY(freedave_emulated, m) {
#else
STABLE_TORCH_LIBRARY(freedave, m) {
#endif
  m.def(
      "predict_tokens(Tensor logits, Tensor input_ids, int mask_token_id, Tensor? mask_index=None, "
      "str measure=\"prob\", Tensor? suppress_tokens=None, bool logits_shift=False) -> (Tensor, Tensor)");
  m.def(
      "rank_positions(Tensor confidence, Tensor mask_index, str order=\"confidence\", int? block_length=None) "
      "-> Tensor");
  m.def(
      "select_transfer(Tensor confidence, Tensor mask_index, int num_transfer=1, Tensor? num_transfer_per_row=None, "
      "float? threshold=None, bool strict=False, str fallback=\"top\", str order=\"confidence\", "
      "int? block_length=None) -> Tensor");
  m.def(
      "build_drafts(Tensor input_ids, Tensor token_ids, Tensor confidence, int mask_token_id, int draft_steps, "
      "int tokens_per_step=1, float? threshold=None, str order=\"confidence\", int? block_length=None) "
      "-> (Tensor, Tensor)");
  m.def(
      "verify_drafts(Tensor drafts, Tensor targets, Tensor? num_drafts=None, str match=\"exact\", "
      "int? mask_token_id=None) -> Tensor");
  m.def(
      "draft_step(Tensor drafts, Tensor token_ids, Tensor confidence, Tensor num_drafts, int mask_token_id, "
      "int draft_steps, int tokens_per_step=1, float? threshold=None, str order=\"confidence\", "
      "int? block_length=None, str drafting=\"recycled\", str match=\"exact\", int? eos_token_id=None, "
      "Tensor? step=None) -> (Tensor drafts, Tensor confidence, Tensor record)");
}

#if defined(FREEDAVE_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(freedave_emulated, CPU, m) { implement<Cuda>(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(freedave, CPU, m) { implement<Cpu>(m); }
#if FREEDAVE_HAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(freedave, CUDA, m) { implement<Cuda>(m); }
#endif
#endif

}  // namespace freedave

#if FREEDAVE_HAS_CUDA && !defined(FREEDAVE_EMULATED)
// Whether the kernels can find the streams of the torch that loaded this library. For checks without a GPU.
extern "C" __attribute__((visibility("default"))) bool freedave_finds_cuda_streams() {
  return freedave::current_stream() != nullptr;
}
#endif
