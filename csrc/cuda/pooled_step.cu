// Verification through all states whose predictions are known, and the next drafts from the nearest of them, in one
// launch.
//
// A block of threads owns a sequence, a thread a position. Every warp keeps in its lanes, of each known state, how far
// it is from the state at work and at how many filled positions the two disagree. A position that is filled changes
// both by one look at it in every state, all at once. So which known state decoding has come to, which it may still
// come through and which is nearest are answered within a warp: only ranking positions and saying which are filled
// takes a barrier, where a window has several warps. Each position is filled once at most, by verification or by the
// walk to the next drafts, so drafts are not kept: one holds what was filled before it.
#include "cuda/known_states.cuh"
#include "freedave/pooled_step.h"

namespace freedave::cuda {
namespace {

// The best of the next drafts' candidates, the best in lane 0 of every warp: of equal ones the earlier is better.
class Best {
 public:
  __device__ explicit Best(int most) : most_(most) {}

  __device__ int count() const { return count_; }
  __device__ float least() const { return __shfl_sync(kFullWarp, score_, most_ - 1); }  // of `most` candidates

  __device__ void add(float score, int candidate) {
    const unsigned better = __ballot_sync(kFullWarp, lane_id() < count_ && score_ >= score);
    const int rank = __popc(better);
    const float score_above = __shfl_up_sync(kFullWarp, score_, 1);
    const int candidate_above = __shfl_up_sync(kFullWarp, candidate_, 1);
    if (lane_id() >= rank) {
      score_ = lane_id() == rank ? score : score_above;
      candidate_ = lane_id() == rank ? candidate : candidate_above;
    }
    count_ = min(count_ + 1, most_);
  }

  // The earliest candidate after this one.
  __device__ int after(int candidate) const {
    const bool later = lane_id() < count_ && candidate_ > candidate;
    return static_cast<int>(__reduce_min_sync(kFullWarp, later ? static_cast<uint32_t>(candidate_) : kNone));
  }

 private:
  const int most_;
  int count_ = 0;
  float score_ = 0.0f;
  int candidate_ = 0;
};

// A sequence as the thread of one position sees it.
class Sequence {
 public:
  __device__ Sequence(const PooledStepParams& p, Shared& shared)
      : p_(p),
        shared_(shared),
        known_(p, shared),
        window_(shared.answers, known_.length(), p.step.rules.block_length),
        tallies_(known_, window_, shared) {
    const int64_t token_id = known_.state(0, window_.position);
    open_ = window_.inside && token_id == known_.mask();
    if (window_.inside) shared_.token_ids[window_.position] = token_id;
    enter_block();
  }

  __device__ void run() {
    const bool begun = verify();
    tallies_.keep(known_.entries(), shared_);
    Best best(static_cast<int>(p_.step.draft_steps) - 1);
    if (begun) walk(best);
    write_drafts(best);
    if (window_.position == 0) {
      const int num_drafts = begun ? 1 + best.count() : 0;
      count(Counter::kForwardDrafts, counted(Counter::kMaskedInWindow) > 0 ? num_drafts : 0);
      count(Counter::kNumDrafts, num_drafts);
    }
    __syncthreads();  // entries that go are looked at until here
    write_pool();
  }

 private:
  __device__ Record record() const { return record_of(p_.step, blockIdx.x); }
  // Of the first thread.
  __device__ int64_t& counted(Counter column) const { return record().counters[static_cast<int>(column)]; }
  __device__ void count(Counter column, int64_t value) const { counted(column) = value; }

  // Where the current block begins and ends.
  __device__ int begin() const { return window_.begin_of(block_); }
  __device__ int end() const { return min(begin() + window_.block_length, window_.length); }
  __device__ bool in_block() const { return open_ && window_.block == block_; }
  __device__ bool finished() const { return ended_ || left_ == 0; }

  // The current block of the state at work has nothing left: the next one.
  __device__ void enter_block() {
    block_ = window_.current_block(open_);
    const int i = window_.position;
    const bool ends = i < begin() && i >= shared_.answer_start && shared_.rule.ends(shared_.token_ids[i]);
    constexpr uint32_t kEnds = 1 << 16;
    const uint32_t both = window_.sum(static_cast<uint32_t>(in_block()) + (ends ? kEnds : 0));
    left_ = static_cast<int>(both % kEnds);
    ended_ = both >= kEnds;
  }

  // This open position is expected to be filled with `token_id`.
  __device__ void expect(int64_t token_id, float probability) {
    shared_.token_ids[window_.position] = token_id;
    shared_.probabilities[window_.position] = probability;
  }

  // What known state k predicts, which is the state at work.
  __device__ float expect_as_known(int k) {
    if (!in_block()) return -INFINITY;
    const auto [token_id, confidence] = known_.prediction(k, window_.position);
    expect(token_id, 1.0f);
    return confidence;
  }

  // Each position as predicted at the nearest known state that has a prediction there. What is filled by now, but not
  // in that state, has half the effects on its confidence that were measured.
  __device__ float foresee() {
    float confidence = -INFINITY;
    bool missing = in_block();
    uint32_t nearest = 0;
    while (__any_sync(kFullWarp, missing)) {
      nearest = tallies_.nearest(nearest);
      if (nearest == kNone) break;
      const int k = Tallies::state_of(nearest);
      KnownStates::Prediction there{0, -INFINITY};
      if (missing) there = known_.prediction(k, window_.position);
      if (__any_sync(kFullWarp, is_rankable(there.confidence))) {
        uint32_t effects = tallies_.effects(known_, k);
        if (is_rankable(there.confidence)) {
          confidence = there.confidence;
          for (; effects != 0; effects &= effects - 1) confidence += effect(__ffs(static_cast<int>(effects)) - 1);
          expect(there.token_id, probability(confidence));
          missing = false;
        }
      }
      ++nearest;
    }
    return confidence;
  }

  // What filling the position that draft k adds is expected to do to this thread's confidence.
  __device__ float effect(int k) const {
    const float before = known_.prediction(k - 1, window_.position).confidence;
    const float after = known_.prediction(k, window_.position).confidence;
    return is_rankable(before) && is_rankable(after) ? kEffect * (after - before) : 0.0f;
  }

  // One static step: fills positions as expected, where this thread's is expected with `confidence`. How many. `values`
  // is multiplied by their probabilities.
  __device__ int fill_as_expected(float confidence, float& values) {
    const StepRule& rule = shared_.rule;
    bool mine = false;
    uint32_t words = 0;  // of the block's warps: which of their threads' positions are filled
    if (rule.has_threshold) {
      mine = passes_threshold(window_, rule.order, rule.threshold, rule.rule, open_, confidence, block_);
      words = window_.ballots(mine);
    }
    if (!__any_sync(kFullWarp, words != 0)) {
      mine = rule.tokens_per_step < left_
                 ? fill_first(window_, rule.order, rule.tokens_per_step, in_block(), confidence).mine
                 : in_block() && is_rankable(confidence);
      words = window_.ballots(mine);
    }
    __syncwarp();
    open_ = open_ && !mine;
    int count = 0;
    for (unsigned warps = __ballot_sync(kFullWarp, words != 0); warps != 0; warps &= warps - 1) {
      const int warp = __ffs(static_cast<int>(warps)) - 1;
      for (unsigned lanes = __shfl_sync(kFullWarp, words, warp); lanes != 0; lanes &= lanes - 1) {
        const int i = warp * kWarp + __ffs(static_cast<int>(lanes)) - 1;
        tallies_.fill(known_, i, shared_.token_ids[i]);
        values *= shared_.probabilities[i];  // in the order of positions
        ++count;
      }
    }
    left_ -= count;
    if (left_ == 0 && count > 0) enter_block();
    return count;
  }

  // Static decoding from draft 0 through all states that are known. Whether the last step has filled any position.
  __device__ bool verify() {
    const bool was_open = open_;
    int last = 0, steps = 0, filled = 0, committed_by = -1;
    float certain = 1.0f;
    bool broken = false;
    for (int at = 0; at >= 0;) {
      last = at;
      if (at < known_.drafts() && window_.position == 0) {  // the last of these remains
        count(Counter::kAccepted, at);
        count(Counter::kPrefixLength, begin());
      }
      const float confidence = expect_as_known(at);
      broken = in_block() && !is_rankable(confidence);
      filled = 0;
      if (at > 0 || (left_ > 0 && end() <= shared_.computed[0])) filled = fill_as_expected(confidence, certain);
      if (was_open && !open_ && committed_by < 0) committed_by = steps;
      steps += filled > 0;
      at = filled > 0 && !finished() ? tallies_.find(end()) : -1;
    }
    write_verified(last, committed_by);
    const uint32_t non_finite = window_.min(broken ? static_cast<uint32_t>(window_.position) : kNone);
    const uint32_t committed = window_.sum(committed_by >= 0), in_window = window_.sum(open_);
    if (window_.position == 0) {
      count(Counter::kSteps, steps);
      count(Counter::kTokensCommitted, committed);
      count(Counter::kMaskedInBlock, left_);
      count(Counter::kMaskedInWindow, in_window);
      count(Counter::kFinished, finished());
      count(Counter::kNonFinite, non_finite == kNone ? -1 : static_cast<int64_t>(non_finite));
      count(Counter::kEnded, ended_);
    }
    return filled > 0;
  }

  // The predictions of the last known state, and what is committed, the next draft 0.
  __device__ void write_verified(int last, int committed_by) const {
    const int i = window_.position;
    if (!window_.inside) return;
    const auto [token_id, confidence] = known_.prediction(last, i);
    const Record to = record();
    to.token_ids[i] = token_id;
    to.confidence[i] = confidence;
    if (i + 1 == window_.length && i + 1 < to.confidence_end) to.confidence[i + 1] = 0.0f;
    to.step_map[i] = committed_by < 0 ? -1 : shared_.step + committed_by;
    to.drafts[i] = open_ ? known_.mask() : shared_.token_ids[i];
  }

  // Goes on as decoding is expected to: by what is known where the state is, else as foreseen. States of the second
  // kind are candidates for the next drafts. The first, which is certain, is none of the best.
  __device__ void walk(Best& best) {
    const bool pipelined = p_.drafting == PooledDrafting::kPipelined;
    const int wanted = static_cast<int>(p_.step.draft_steps);
    float score = 1.0f, values = 1.0f;  // how likely all of what was foreseen is
    int candidates = 0;
    uint32_t block = block_;
    while (!finished() && score > kLeastScore) {
      if (pipelined && block_ != block) score = score_of_values(values);
      block = block_;
      const bool was_open = open_;
      const int at = tallies_.find(end());
      float confidence;
      if (at >= 0) {
        confidence = expect_as_known(at);
      } else {
        // Scores fall, but for a later block, whose score falls with the values.
        if (candidates >= wanted &&
            (!pipelined || wanted == 1 || best.least() >= fmaxf(score, score_of_values(values))))
          break;
        if (candidates > 0 && wanted > 1) best.add(score, candidates);
        ++candidates;
        score *= kScoreDecay;
        confidence = foresee();
      }
      if (fill_as_expected(confidence, values) == 0) break;
      if (was_open && !open_) filled_before_ = candidates;
    }
  }

  // The certain draft stands there already. The others go as far as the walk had come; behind them the last again.
  __device__ void write_drafts(const Best& best) const {
    int candidate = 0;
    for (int k = 1; k < p_.step.draft_steps; ++k) {
      if (k <= best.count()) candidate = best.after(candidate);
      const bool filled = !open_ && filled_before_ <= candidate;
      if (window_.inside)
        record().drafts[k * p_.step.length + window_.position] =
            filled ? shared_.token_ids[window_.position] : known_.mask();
    }
  }

  // Entries that are kept stay where they are; drafts go where there is room, the oldest first.
  __device__ void write_pool() const {
    static_assert(kGroups == 3);
    const DraftPool pool = known_.pool();
    const uint32_t* kept = shared_.kept;
    const int drafts = known_.drafts(), i = window_.position, threads = static_cast<int>(blockDim.x);
    uint64_t stays = (static_cast<uint64_t>(kept[1]) << kWarp | kept[0]) >> drafts;
    stays |= static_cast<uint64_t>(kept[2]) << (2 * kWarp - drafts);
    for (int n = i; n < known_.entries(); n += threads) {
      if ((stays >> n & 1) == 0) pool.age[n] = 0;
    }
    for (uint32_t left = kept[0] & (0xffffffffu >> (kWarp - drafts)); left != 0; left &= left - 1) {
      const int k = __ffs(static_cast<int>(left)) - 1;
      const int n = __ffsll(static_cast<long long>(~stays)) - 1;
      stays |= uint64_t{1} << n;
      if (i < known_.columns()) {
        const int place = n * known_.columns() + known_.column(i);
        const auto [token_id, confidence] = known_.prediction(k, i);
        pool.states[place] = known_.state(k, i);
        pool.token_ids[place] = token_id;
        pool.confidence[place] = confidence;
      }
      if (n % threads == i) {  // who may have written 0 there
        pool.computed[n] = shared_.start + shared_.computed[k];
        pool.age[n] = shared_.clock + 1 + k;
      }
    }
    if (i == 0) *pool.start = shared_.start;
  }

  const PooledStepParams& p_;
  Shared& shared_;
  const KnownStates known_;
  Window window_;
  Tallies tallies_;

  // The state at work, which only ever fills.
  bool open_;
  uint32_t block_;         // the current one
  int left_;               // of its positions are open
  bool ended_;             // a complete block ends the sequence
  int filled_before_ = 0;  // the first candidate that has this position's token
};

__global__ void __launch_bounds__(kMaxLength) step_pooled_sequences(const __grid_constant__ PooledStepParams p) {
  FREEDAVE_SHARED(Shared, shared);
  let_next_kernel_launch();
  wait_for_previous_kernel();
  shared.read(p, blockIdx.x);
  Sequence(p, shared).run();
}

}  // namespace

Error launch(const PooledStepParams& p, Stream stream) {
  const DraftStepParams& step = p.step;
  if (step.batch == 0) return cudaSuccess;
  if (p.pool_columns > kMaxLength || p.pool_entries > kMaxPoolStates || step.draft_steps > kMaxDrafts ||
      step.input_drafts > kMaxDrafts || step.batch > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  const auto blocks = static_cast<unsigned>(step.batch);
  return launch_kernel(step_pooled_sequences, dim3(blocks), threads_for(p.pool_columns), stream, p);
}

}  // namespace freedave::cuda
