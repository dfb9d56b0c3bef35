#pragma once

// One window of L <= 1024 positions in one block of threads: thread i owns position i. What follows are the questions
// that the ops ask about a window, answered to all threads at once; every thread of the block must ask them together.
//
// A question costs a few warp instructions, and for windows beyond 32 positions one barrier: each warp leaves its
// answer in shared memory and every warp combines all of them, so no second barrier is needed. Two sets of answers
// alternate, because a warp may ask the next question while another still reads the answers to the last.
#include "cuda/device.cuh"
#include "freedave/limits.h"
#include "freedave/static_step.h"

namespace freedave::cuda {

// As many threads as serve `length` positions in whole warps.
inline unsigned threads_for(int64_t length) { return static_cast<unsigned>((length + kWarp - 1) / kWarp * kWarp); }

// A position in the order in which positions are committed. Keys of lower blocks, then smaller keys, then lower
// positions come first. Lanes and warps are in the order of positions, so ties need no comparison.
struct Candidate {
  uint32_t block;
  uint32_t key;
  int position;
};

inline constexpr uint32_t kNoBlock = 0xffffffffu;
inline constexpr uint32_t kUnrankable = 0xffffffffu;  // behind every position that has a confidence

class Window {
 public:
  static constexpr int kWarps = static_cast<int>(kMaxLength) / kWarp;

  struct Answers {
    Candidate candidate[2][kWarps];
    uint32_t word[2][kWarps];
  };

  __device__ Window(Answers& answers, int length, int64_t block_length)
      : position(static_cast<int>(threadIdx.x)),
        inside(position < length),
        block_length(block_length < length ? static_cast<int>(block_length) : length),
        block(inside ? static_cast<uint32_t>(position / this->block_length) : kNoBlock),
        length(length),
        answers_(answers) {}

  const int position;
  const bool inside;
  const int block_length;
  const uint32_t block;
  const int length;

  // The first of all threads' candidates.
  __device__ Candidate first(Candidate mine) {
    mine = warp_first(mine);
    if (blockDim.x == kWarp) return mine;
    if (lane_id() == 0) answers_.candidate[turn_][warp_id()] = mine;
    __syncthreads();
    const bool answered = lane_id() < static_cast<int>(blockDim.x) / kWarp;
    mine = answered ? answers_.candidate[turn_][lane_id()] : Candidate{kNoBlock, kUnrankable, 0};
    turn_ ^= 1;
    return warp_first(mine);
  }

  __device__ uint32_t min(uint32_t mine) {
    return combine(__reduce_min_sync(kFullWarp, mine), 0xffffffffu,
                   [](uint32_t x) { return __reduce_min_sync(kFullWarp, x); });
  }

  __device__ uint32_t sum(uint32_t mine) {
    return combine(__reduce_add_sync(kFullWarp, mine), 0, [](uint32_t x) { return __reduce_add_sync(kFullWarp, x); });
  }

  __device__ uint32_t any_bits(uint32_t mine) {
    return combine(__reduce_or_sync(kFullWarp, mine), 0, [](uint32_t x) { return __reduce_or_sync(kFullWarp, x); });
  }

  __device__ bool any(bool mine) { return any_bits(mine) != 0; }

  // Which threads say yes: those of warp w in lane w, as bits.
  __device__ uint32_t ballots(bool mine) {
    const uint32_t warps = combine(__ballot_sync(kFullWarp, mine), 0, [](uint32_t x) { return x; });
    return lane_id() < static_cast<int>(blockDim.x) / kWarp ? warps : 0;
  }

  // The current block is the lowest with a masked position, kNoBlock when nothing is masked.
  __device__ uint32_t current_block(bool masked) { return min(masked ? block : kNoBlock); }

  // Where that block begins: as many positions lie in complete blocks before it.
  __device__ int begin_of(uint32_t current) const {
    return current == kNoBlock ? length : static_cast<int>(current) * block_length;
  }

 private:
  __device__ static Candidate warp_first(Candidate mine) {
    const uint32_t block = __reduce_min_sync(kFullWarp, mine.block);
    const uint32_t key = __reduce_min_sync(kFullWarp, mine.block == block ? mine.key : kUnrankable);
    const unsigned tied = __ballot_sync(kFullWarp, mine.block == block && mine.key == key);
    return {block, key, __shfl_sync(kFullWarp, mine.position, __ffs(static_cast<int>(tied)) - 1)};
  }

  template <typename Reduce>
  __device__ uint32_t combine(uint32_t warps, uint32_t neutral, const Reduce& reduce) {
    if (blockDim.x == kWarp) return warps;
    if (lane_id() == 0) answers_.word[turn_][warp_id()] = warps;
    __syncthreads();
    const bool answered = lane_id() < static_cast<int>(blockDim.x) / kWarp;
    const uint32_t theirs = answered ? answers_.word[turn_][lane_id()] : neutral;
    turn_ ^= 1;
    return reduce(theirs);
  }

  Answers& answers_;
  int turn_ = 0;
};

__device__ __forceinline__ uint32_t key_of(Order order, float confidence) {
  if (!is_rankable(confidence)) return kUnrankable;
  return order == Order::kConfidence ? descending(confidence) : 0;
}

// The keys of a row, for ranking by counting. position_key's, or kNoKey for a position that is not ranked.
using RowKeys = uint64_t[kMaxLength];
inline constexpr uint64_t kNoKey = ~uint64_t{0};

// How many keys of `block` come before `key`.
__device__ __forceinline__ int rank_in_block(const RowKeys& keys, Span block, uint64_t key) {
  int rank = 0;
  for (int j = static_cast<int>(block.begin); j < static_cast<int>(block.end); ++j) rank += keys[j] < key;
  return rank;
}

// What one static step fills.
struct Fill {
  bool mine;  // this thread's position
  int count;  // positions in all
};

// Fills the first `picks` ranked positions, all of one block: a step never crosses into the next. None where the block
// has a masked position but no ranked one. Every thread calls `on_pick` with each position filled.
template <typename OnPick>
__device__ __forceinline__ Fill fill_first(Window& window, Order order, int64_t picks, bool masked, float confidence,
                                           const OnPick& on_pick) {
  Fill fill{false, 0};
  const uint32_t key = key_of(order, confidence);
  uint32_t block = kNoBlock;
  while (fill.count < picks) {
    const bool candidate = masked && !fill.mine;
    const Candidate next = window.first({candidate ? window.block : kNoBlock, key, window.position});
    if (next.block == kNoBlock || next.key == kUnrankable || (fill.count > 0 && next.block != block)) break;
    block = next.block;
    fill.mine |= next.position == window.position;
    ++fill.count;
    on_pick(next.position);
  }
  return fill;
}

__device__ __forceinline__ Fill fill_first(Window& window, Order order, int64_t picks, bool masked, float confidence) {
  return fill_first(window, order, picks, masked, confidence, [](int) {});
}

// passes_threshold for rules that ask one position after the other, each of which costs a pick.
__device__ __forceinline__ bool passes_in_turn(Window& window, Order order, Passing passing, bool candidate,
                                               float confidence) {
  const uint32_t certain = key_of(Order::kConfidence, confidence);
  bool open = candidate;
  while (true) {
    // Left to right, a position that cannot be ranked keeps its place, and ends the run.
    const uint32_t key = order == Order::kConfidence ? certain : 0;
    const Candidate next = window.first({open ? window.block : kNoBlock, key, window.position});
    if (next.block == kNoBlock) break;
    const bool mine = next.position == window.position;
    const uint32_t sure = order == Order::kConfidence ? next.key : window.min(mine ? certain : kUnrankable);
    if (sure == kUnrankable || !passing.passes(confidence_at(sure))) break;
    open = open && !mine;
  }
  if (passing.takes_last(window.sum(open))) open = open && !is_rankable(confidence);
  return candidate && !open;
}

// Whether this thread's position passes the threshold, in the current block `block`: by confidence all that pass, left
// to right only the leading run of masked positions.
__device__ __forceinline__ bool passes_threshold(Window& window, Order order, double threshold, Rule rule, bool masked,
                                                 float confidence, uint32_t block) {
  const bool candidate = masked && window.block == block;
  if (!ignores_rank(rule)) return passes_in_turn(window, order, {rule, threshold}, candidate, confidence);
  const bool passes = candidate && is_rankable(confidence) && is_above(rule, confidence, threshold);
  if (order == Order::kConfidence) return passes;
  const uint32_t position = static_cast<uint32_t>(window.position);
  const uint32_t first_that_fails = window.min(candidate && !passes ? position : 0xffffffffu);
  return passes && position < first_that_fails;
}

// One step of static decoding from a window in which this thread's position is `masked` and predicted with
// `confidence`.
__device__ __forceinline__ Fill static_step(Window& window, const StepRule& rule, bool masked, float confidence) {
  if (rule.has_threshold) {
    const uint32_t block = window.current_block(masked);
    const bool mine = passes_threshold(window, rule.order, rule.threshold, rule.rule, masked, confidence, block);
    const int count = static_cast<int>(window.sum(mine));
    if (count > 0) return {mine, count};
  }
  return fill_first(window, rule.order, rule.tokens_per_step, masked, confidence);
}

// The positions that each draft after the first adds to the one before.
__device__ __forceinline__ int64_t picks_of(const StepRule& rule) {
  return rule.has_threshold ? 1 : rule.tokens_per_step;
}

}  // namespace freedave::cuda
