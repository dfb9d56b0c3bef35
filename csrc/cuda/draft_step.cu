// Everything between two forwards, in one launch: which drafts were right, what is final, and the next drafts.
//
// A block of threads owns a sequence, a thread a position. The block walks the chain of drafts: one static step from
// the current draft, one reduction of agreement bits, one hop; the step that leads nowhere is the next draft 0. The
// next drafts are a chain of picks (see window.cuh), recycled ones with the predictions of the input draft that is
// nearest, whose distances every warp keeps in its lanes. A sequence is a few kilobytes that stay in L1: latency-bound.
#include "cuda/verification.cuh"
#include "freedave/draft_step.h"

namespace freedave::cuda {
namespace {

// One sequence's input drafts and predictions.
struct Sequence {
  Slab<const int64_t> drafts, token_ids;
  Slab<const float> confidences;
  StepRule rule;
  int num_drafts;

  __device__ Sequence(const DraftStepParams& p, int64_t b)
      : drafts(p.drafts, b * p.input_drafts),
        token_ids(p.token_ids, b * p.input_drafts),
        confidences(p.confidence, b * p.input_drafts),
        rule(p.rules.of(b)) {
    const int64_t given = p.num_drafts.at(b);
    // Draft 0 is right by construction, hence at least one.
    num_drafts = static_cast<int>(given < 1 ? 1 : given < p.input_drafts ? given : p.input_drafts);
  }

  __device__ int64_t draft(int k, int i) const { return drafts.at(k, i); }
  __device__ int64_t token_id(int k, int i) const { return token_ids.at(k, i); }
  __device__ float confidence(int k, int i) const {
    return confidence_in(token_id(k, i), confidences.at(k, i), rule.mask_token_id);
  }
  __device__ bool is_masked(int k, int i) const { return draft(k, i) == rule.mask_token_id; }
};

// Hamming distances of the input drafts to a state, draft j's in lane j of every warp.
class Distances {
 public:
  using Counts = uint32_t[kMaxDrafts];

  __device__ Distances(Window& window, const Sequence& sequence, int64_t state, Counts& counts) : sequence_(sequence) {
    if (window.position < kMaxDrafts) counts[window.position] = 0;
    __syncthreads();
    for (int j = 0; j < sequence.num_drafts; ++j) {
      const bool differs = window.inside && sequence.draft(j, window.position) != state;
      const unsigned differing = __ballot_sync(kFullWarp, differs);
      if (lane_id() == 0 && differing != 0)
        atomicAdd(&counts[j], static_cast<uint32_t>(__popc(static_cast<int>(differing))));
    }
    __syncthreads();
    mine_ = counts[lane_id()];
  }

  // The lowest index among equal distances.
  __device__ int nearest() const {
    // At most 1024 positions and 32 drafts, so both fit in a word.
    const uint32_t key = mine_ * kMaxDrafts + static_cast<uint32_t>(lane_id());
    const bool active = lane_id() < sequence_.num_drafts;
    return static_cast<int>(__reduce_min_sync(kFullWarp, active ? key : 0xffffffffu) % kMaxDrafts);
  }

  // The state's masked position i now holds `token`.
  __device__ void fill(int i, int64_t token) {
    if (lane_id() >= sequence_.num_drafts) return;
    const int64_t there = sequence_.draft(lane_id(), i);
    mine_ += static_cast<uint32_t>(there != token) - static_cast<uint32_t>(there != sequence_.rule.mask_token_id);
  }

 private:
  const Sequence& sequence_;
  uint32_t mine_;
};

// The next drafts, of which `state` is this thread's position in draft 0; writes the others and returns how many there
// are, and how many of the leading ones have a masked position.
struct Chain {
  int num_drafts;
  int forward_drafts;
};

__device__ __forceinline__ Chain chain_drafts(const DraftStepParams& p, Window& window, const Sequence& sequence,
                                              Distances::Counts& counts, int64_t* drafts, int accepted, bool begun,
                                              int64_t state, bool open_left) {
  const int64_t mask = sequence.rule.mask_token_id;
  const int i = window.position;
  const bool recycled = p.drafting == Drafting::kRecycled;
  bool open = window.inside && state == mask;
  Distances distances(window, sequence, state, counts);

  Chain chain{begun ? 1 : 0, begun && open_left ? 1 : 0};
  for (int k = 1; k < p.draft_steps; ++k) {
    if (chain.num_drafts == k) {
      // Nested drafts take the accepted draft's predictions. Recycled ones take those of the nearest draft, and the
      // accepted draft's where the nearest has a token already.
      const int nearest = recycled ? distances.nearest() : accepted;
      const auto source_of = [&](int position) { return sequence.is_masked(nearest, position) ? nearest : accepted; };
      const int source = open ? source_of(i) : accepted;
      const float confidence = open ? sequence.confidence(source, i) : -INFINITY;
      const Fill fill =
          fill_first(window, sequence.rule.order, picks_of(sequence.rule), open, confidence, [&](int position) {
            if (recycled) distances.fill(position, sequence.token_id(source_of(position), position));
          });
      if (fill.mine) {
        state = sequence.token_id(source, i);
        open = false;
      }
      if (fill.count > 0) {
        ++chain.num_drafts;
        if (chain.forward_drafts == k) chain.forward_drafts += window.any(window.inside && state == mask);
      }
    }
    if (window.inside) drafts[k * p.length + i] = state;
  }
  return chain;
}

// Where the chain of drafts ends, as the thread of one position sees it.
struct ChainEnd {
  int accepted;       // the draft
  bool open;          // whether the position is masked there
  int64_t committed;  // its token one static step later, which is that of the next draft 0
  bool begun;         // whether that step fills any position
  int committed_by;   // the static step, counted from this call's first, that filled the position; -1: none did
  int steps;          // static steps that filled any position
};

// Walks the chain of drafts, each hop one static step. Where it ends, that step leads to the next draft 0.
__device__ __forceinline__ ChainEnd walk_chain(const DraftStepParams& p, Window& window, const Sequence& sequence) {
  const int64_t mask = sequence.rule.mask_token_id;
  const int i = window.position;
  int accepted = 0, steps = 0, committed_by = -1;
  int64_t state = window.inside ? sequence.draft(0, i) : 0;
  const bool was_open = window.inside && state == mask;
  bool open = was_open;
  // A step that fills no position is not counted: where nothing can be ranked, a draft is its own target.
  const auto count_step = [&](bool filled) {
    const bool fresh = was_open && filled && committed_by < 0;
    if (fresh) committed_by = steps;
    steps += window.any(fresh);
  };
  int64_t committed;
  Fill fill;
  for (;;) {
    const float confidence = open ? sequence.confidence(accepted, i) : -INFINITY;
    fill = static_step(window, sequence.rule, open, confidence);
    committed = fill.mine ? sequence.token_id(accepted, i) : state;
    const int next = furthest_match(window, accepted, sequence.num_drafts, p.match, mask, committed,
                                    [&](int j) { return sequence.draft(j, i); });
    if (next < 0) break;
    accepted = next;
    if (window.inside) state = sequence.draft(accepted, i);
    open = window.inside && state == mask;
    count_step(!open);
  }
  count_step(committed != mask);
  return {accepted, open, committed, fill.count > 0, committed == mask ? -1 : committed_by, steps};
}

__global__ void __launch_bounds__(kMaxLength) step_sequences(const __grid_constant__ DraftStepParams p) {
  FREEDAVE_SHARED(Window::Answers, answers);
  FREEDAVE_SHARED(Distances::Counts, counts);
  let_next_kernel_launch();
  wait_for_previous_kernel();
  const int64_t b = blockIdx.x;
  const Sequence sequence(p, b);
  Window window(answers, static_cast<int>(p.length), p.rules.block_length);
  const int i = window.position;
  const auto [accepted, open, committed, begun, committed_by, steps] = walk_chain(p, window, sequence);

  // Write the accepted draft's predictions and what is committed.
  int64_t step_map = -1;
  if (window.inside) {
    const Record record = record_of(p, b);
    record.token_ids[i] = sequence.token_id(accepted, i);
    record.confidence[i] = sequence.confidence(accepted, i);
    if (i + 1 == p.length && i + 1 < record.confidence_end) record.confidence[i + 1] = 0.0f;
    if (committed_by >= 0) step_map = (p.step.data ? p.step.at(b) : 0) + committed_by;
    record.step_map[i] = step_map;
    record.drafts[i] = committed;
  }

  // What the accepted draft says: how much of its prefix is complete, so that its keys and values can be kept, and the
  // lowest position of its current block that has no prediction.
  const uint32_t accepted_block = window.current_block(open);
  const bool broken = open && window.block == accepted_block && !is_rankable(sequence.confidence(accepted, i));
  const uint32_t non_finite = window.min(broken ? static_cast<uint32_t>(i) : kNoBlock);

  // What the committed state says.
  const bool left = window.inside && committed == sequence.rule.mask_token_id;
  const uint32_t block = window.current_block(left);
  const int complete = window.begin_of(block);
  bool ended = false;
  const int64_t eos_token_id = p.rules.eos_token_id.of(b);  // not before: registers are scarce until here
  if (eos_token_id >= 0) {
    const int64_t answer_start = p.answer_start.data ? p.answer_start.at(b) : 0;  // the prompt ends nothing
    ended = window.any(i < complete && i >= answer_start && committed == eos_token_id);
  }
  const uint32_t in_block = window.sum(left && window.block == block);
  const uint32_t in_window = window.sum(left);
  const uint32_t tokens_committed = window.sum(step_map >= 0);

  const Chain chain =
      chain_drafts(p, window, sequence, counts, record_of(p, b).drafts, accepted, begun, committed, in_window > 0);

  if (i > 0) return;
  int64_t* counters = record_of(p, b).counters;
  const auto count = [&](Counter column, int64_t value) { counters[static_cast<int>(column)] = value; };
  count(Counter::kAccepted, accepted);
  count(Counter::kSteps, steps);
  count(Counter::kTokensCommitted, tokens_committed);
  count(Counter::kMaskedInBlock, in_block);
  count(Counter::kMaskedInWindow, in_window);
  count(Counter::kPrefixLength, window.begin_of(accepted_block));
  count(Counter::kForwardDrafts, chain.forward_drafts);
  count(Counter::kFinished, ended || in_window == 0);
  count(Counter::kNonFinite, non_finite == kNoBlock ? -1 : static_cast<int64_t>(non_finite));
  count(Counter::kNumDrafts, chain.num_drafts);
  count(Counter::kEnded, ended);
}

}  // namespace

Error launch(const DraftStepParams& p, Stream stream) {
  if (p.batch == 0) return cudaSuccess;
  if (p.length > kMaxLength || p.draft_steps > kMaxDrafts || p.input_drafts > kMaxDrafts || p.batch > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  return launch_kernel(step_sequences, dim3(static_cast<unsigned>(p.batch)), threads_for(p.length), stream, p);
}

}  // namespace freedave::cuda
