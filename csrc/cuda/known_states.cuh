#pragma once

// What is known of a sequence whose drafts are pooled: the states that were forwarded and what was predicted at them.
#include "cuda/window.cuh"
#include "freedave/pooled_step.h"

namespace freedave::cuda {

inline constexpr int kMaxKnown = static_cast<int>(kMaxDrafts + kMaxPoolStates);
inline constexpr int kGroups = kMaxKnown / kWarp;  // of known states: a lane keeps one of each
inline constexpr uint32_t kNone = 0xffffffffu;

__device__ __forceinline__ int clamped(int64_t x, int64_t least, int64_t most) {
  return static_cast<int>(x < least ? least : x > most ? most : x);
}

// The tensors of which a sequence has rows or a number.
enum Tensor {
  kDrafts,
  kTokenIds,
  kConfidence,
  kComputedLength,
  kNumDrafts,
  kStep,
  kAnswerStart,
  kWindowStart,
  kSlots,
  kTensors,
};

// What is the same for all threads of a sequence, in shared memory: registers are scarce.
struct Shared {
  // For the state at work, and all known states where they fit.
  static constexpr int64_t kRoom = 44 * 1024;
  alignas(8) char room[kRoom];
  int64_t* token_ids;  // of the state at work; of an open position, what it is expected to hold
  float* probabilities;

  Window::Answers answers;
  uint32_t differences[kMaxKnown];  // of each known state from draft 0
  uint32_t kept[kGroups];           // a bit a known state
  int computed[kMaxDrafts];         // leading positions of each draft whose predictions are known
  // Of each known state: by column, but for the first `as_given`, which are drafts in the call's tensors.
  int64_t *states[kMaxKnown], *predicted[kMaxKnown];
  float* confidences[kMaxKnown];
  int as_given;
  int64_t* pool;
  int64_t start;  // the position of the window's first element
  int64_t clock;  // the age of the newest entry
  int64_t step;
  int64_t offsets[kTensors];
  int num_drafts;
  int origin;  // the column of the window's first position
  int answer_start;
  bool forget;
  StepRule rule;

  __device__ void read(const PooledStepParams& p, int64_t b) {
    if (warp_id() == 0) find_rows(p, b);
    const DraftStepParams& call = p.step;
    const int i = static_cast<int>(threadIdx.x);
    if (i < call.input_drafts) {
      const int64_t place = offsets[kComputedLength] + i * p.computed_length.rows.step;
      computed[i] = clamped(p.computed_length.data ? p.computed_length.data[place] : call.length, 0, call.length);
    }
    if (i == 0) {
      const auto number = [&](const Counts& counts, Tensor tensor, int64_t otherwise) {
        return counts.data ? counts.read(offsets[tensor]) : otherwise;
      };
      pool = pool_of(p, clamped(number(p.slots, kSlots, b), 0, p.pool_slots - 1)).states;
      start = number(p.window_start, kWindowStart, 0);
      step = number(call.step, kStep, 0);
      num_drafts = clamped(number(call.num_drafts, kNumDrafts, 1), 1, call.input_drafts);  // draft 0 is always right
      origin = static_cast<int>(column_of(start, p.pool_columns));
      answer_start = clamped(number(call.answer_start, kAnswerStart, 0), 0, call.length);
      forget = p.forget.data && p.forget.at(0, b);
      rule = call.rules.of(b);
    }
    __syncthreads();
    share_room(p);
    __syncthreads();
  }

 private:
  __device__ void share_room(const PooledStepParams& p) {
    const int i = static_cast<int>(threadIdx.x), count = num_drafts + static_cast<int>(p.pool_entries);
    const int64_t stride = p.pool_columns | 1;  // odd: lanes that look at one column of all rows find it in other banks
    const int64_t bytes = sizeof(int64_t) + sizeof(float);
    const bool fit = stride * (bytes + count * (sizeof(int64_t) + bytes)) <= kRoom;
    auto* integers = reinterpret_cast<int64_t*>(room);
    auto* floats = reinterpret_cast<float*>(integers + stride * (fit ? 1 + 2 * count : 1));
    if (i == 0) {
      token_ids = integers;
      probabilities = floats;
      as_given = fit ? 0 : num_drafts;
    }
    const DraftPool entries = pool_at(pool, p.pool_entries, p.pool_columns);
    for (int k = i + (fit ? 0 : num_drafts); k < count; k += static_cast<int>(blockDim.x)) {
      const int64_t near = (1 + k) * stride, there = (k - num_drafts) * p.pool_columns;
      states[k] = fit ? integers + near : entries.states + there;
      predicted[k] = fit ? integers + near + count * stride : entries.token_ids + there;
      confidences[k] = fit ? floats + near : entries.confidence + there;
    }
  }

  // A lane a tensor: the search for where this sequence's rows begin is one piece of code, and not a short one.
  __device__ void find_rows(const PooledStepParams& p, int64_t b) {
    const DraftStepParams& call = p.step;
    const int tensor = lane_id();
    if (tensor < kTensors) {
      const Rows& rows =
          chosen(tensor, call.drafts.rows, call.token_ids.rows, call.confidence.rows, p.computed_length.rows,
                 call.num_drafts.rows, call.step.rows, call.answer_start.rows, p.window_start.rows, p.slots.rows);
      offsets[tensor] = rows.start(tensor <= kConfidence ? b * call.input_drafts : b);
    }
    __syncwarp();
  }

  template <typename... Others>
  __device__ static const Rows& chosen(int n, const Rows& first, const Others&... others) {
    if constexpr (sizeof...(others) == 0) {
      return first;
    } else {
      return n == 0 ? first : chosen(n - 1, others...);
    }
  }
};

// All that is known of a sequence: the active drafts, then the pool's entries. Positions are those of the window, from
// whose end on to the pool's number of columns the drafts are masked.
class KnownStates {
 public:
  __device__ KnownStates(const PooledStepParams& p, const Shared& shared) : p_(p), shared_(shared) {}

  __device__ int drafts() const { return shared_.num_drafts; }
  __device__ int entries() const { return static_cast<int>(p_.pool_entries); }
  __device__ int count() const { return drafts() + entries(); }
  __device__ int length() const { return static_cast<int>(p_.step.length); }
  __device__ int columns() const { return static_cast<int>(p_.pool_columns); }
  __device__ int64_t mask() const { return p_.step.rules.mask_token_id; }
  __device__ DraftPool pool() const { return pool_at(shared_.pool, p_.pool_entries, p_.pool_columns); }

  // The column of a position, in the rows of entries.
  __device__ int column(int i) const {
    const int column = shared_.origin + i;
    return column < columns() ? column : column - columns();
  }

  __device__ int64_t state(int k, int i) const {
    if (k < shared_.as_given) return i < length() ? given(p_.step.drafts, kDrafts, k, i) : mask();
    return i < columns() ? shared_.states[k][column(i)] : mask();
  }

  struct Prediction {
    int64_t token_id;
    float confidence;
  };

  __device__ Prediction prediction(int k, int i) const {
    if (k >= shared_.as_given) return {shared_.predicted[k][column(i)], shared_.confidences[k][column(i)]};
    if (i >= length()) return {mask(), -INFINITY};
    return at_draft(k, i, given(p_.step.drafts, kDrafts, k, i), given(p_.step.token_ids, kTokenIds, k, i),
                    given(p_.step.confidence, kConfidence, k, i));
  }

  // Where there is room for all of it in shared memory, it is copied there, all at once: from then on one look follows
  // from another. Each thread copies its position.
  __device__ void begin_to_copy() const {
    const int i = static_cast<int>(threadIdx.x);
    if (shared_.as_given > 0 || i >= columns()) return;
    const int c = column(i);
    for (int k = 0; k < drafts(); ++k) {
      if (i < length()) {
        copy_later(&shared_.states[k][c], &given(p_.step.drafts, kDrafts, k, i));
        copy_later(&shared_.predicted[k][c], &given(p_.step.token_ids, kTokenIds, k, i));
        copy_later(&shared_.confidences[k][c], &given(p_.step.confidence, kConfidence, k, i));
      } else {
        clear(k, c);
      }
    }
    const DraftPool from = pool();
    for (int n = 0; n < entries(); ++n) {
      copy_later(&shared_.states[drafts() + n][c], &from.states[n * columns() + c]);
      copy_later(&shared_.predicted[drafts() + n][c], &from.token_ids[n * columns() + c]);
      copy_later(&shared_.confidences[drafts() + n][c], &from.confidence[n * columns() + c]);
    }
  }

  __device__ void end_copy() const {
    wait_for_copies();
    const int i = static_cast<int>(threadIdx.x);
    if (shared_.as_given > 0 || i >= length()) return;
    const int c = column(i);
    for (int k = 0; k < drafts(); ++k) {
      const auto known = at_draft(k, i, shared_.states[k][c], shared_.predicted[k][c], shared_.confidences[k][c]);
      shared_.predicted[k][c] = known.token_id;
      shared_.confidences[k][c] = known.confidence;
    }
  }

  // The window's last columns are those that it left when it moved: nothing is known there any more.
  __device__ void forget_columns(int moved) const {
    const int i = static_cast<int>(threadIdx.x);
    if (i < columns() - moved || i >= columns()) return;
    const DraftPool from = pool();
    for (int n = 0; n < entries(); ++n) {
      const int place = n * columns() + column(i);
      from.states[place] = from.token_ids[place] = mask();
      from.confidence[place] = -INFINITY;
      if (shared_.as_given == 0) clear(drafts() + n, column(i));
    }
  }

 private:
  template <typename T>
  __device__ T& given(const Matrix<T>& matrix, Tensor tensor, int k, int i) const {
    const auto row = static_cast<uint32_t>(k), column = static_cast<uint32_t>(i);  // no sign to be kept in a register
    return matrix.data[shared_.offsets[tensor] + row * matrix.rows.row_stride + column * matrix.rows.step];
  }

  __device__ Prediction at_draft(int k, int i, int64_t state, int64_t predicted, float confidence) const {
    const int64_t token_id = i < shared_.computed[k] ? predicted : state;
    return {token_id, state == mask() ? confidence_in(token_id, confidence, mask()) : -INFINITY};
  }

  __device__ void clear(int k, int column) const {
    shared_.states[k][column] = shared_.predicted[k][column] = mask();
    shared_.confidences[k][column] = -INFINITY;
  }

  const PooledStepParams& p_;
  const Shared& shared_;
};

// What every warp keeps in its lanes of all known states, state k in lane k % 32. And in lane k of draft k, if it fills
// one position more than the draft before it, which one: the effect of that on the confidences elsewhere is measured.
class Tallies {
 public:
  // Begins with draft 0. Where the window has slid, the pool forgets what it left.
  __device__ Tallies(const KnownStates& known, const Window& window, Shared& shared) {
    known.begin_to_copy();
    const int64_t moved = shared.start - *known.pool().start;
    const bool slid = moved >= 0 && moved < known.columns();
    order_by_age(known, shared.forget || !slid, shared);
    known.end_copy();
    if (slid) known.forget_columns(static_cast<int>(moved));
    compare_with_first(known, window, shared);
  }

  // Position i of the state at work was open and now holds `token`.
  __device__ void fill(const KnownStates& known, int i, int64_t token) {
    filled_ = filled_ || i == adds_;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (index(g) >= known.count()) break;
      const int64_t there = known.state(index(g), i);
      tally_[g] -= there == known.mask() ? 0 : kDistance;
      if (there != token) tally_[g] = (tally_[g] + kDistance) | kDisagrees;
    }
  }

  // The newest known state that is the state at work, of those at which `end` positions were computed; -1: none.
  __device__ int find(int end) const {
    uint32_t newest = kNone;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const bool found = tally_[g] < kDistance && tally_[g] % kOlder >= static_cast<uint32_t>(end);
      newest = min(newest, found ? newest_first(g, 0) : kNone);
    }
    newest = __reduce_min_sync(kFullWarp, newest == kNone ? kNone : newest + static_cast<uint32_t>(lane_id()));
    return newest == kNone ? -1 : state_of(newest);
  }

  // Numbers that order known states by distance, then age, the oldest first: the least of those from `least` on.
  __device__ uint32_t nearest(uint32_t least) const {
    uint32_t nearest = kNone;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const uint32_t key = tally_[g] % kDisagrees / kOlder * kIndices + static_cast<uint32_t>(index(g));
      nearest = min(nearest, key < least || tally_[g] % kDisagrees >= kUnknown ? kNone : key);
    }
    return __reduce_min_sync(kFullWarp, nearest);
  }

  __device__ static int state_of(uint32_t ordered) { return static_cast<int>(ordered % kIndices); }

  // A bit a draft: whether its effect is measured, of a position that is filled by now, but not in known state k.
  __device__ uint32_t effects(const KnownStates& known, int k) const {
    return __ballot_sync(kFullWarp, filled_ && known.state(k, adds_) == known.mask());
  }

  // The newest that agree with the state at work wherever that is filled, as many as the pool holds. From now on only
  // these are found.
  __device__ void keep(int most, Shared& shared) {
    uint32_t words[kGroups];
    int count = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      words[g] = __ballot_sync(kFullWarp, tally_[g] < kUnknown);
      count += __popc(words[g]);
    }
    if (count > most) leave_newest(most, words);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (threadIdx.x == 0) shared.kept[g] = words[g];
      if ((words[g] >> lane_id() & 1) == 0) tally_[g] -= tally_[g] % kOlder;
    }
  }

 private:
  // Of a known state: the positions that were computed, kOlder times the number of older states, kDistance times the
  // distance, and whether it holds another token where the state at work is filled. Where kUnknown is set, it is none.
  static constexpr uint32_t kOlder = 1 << 11, kDistance = 1 << 18, kUnknown = 1 << 30, kDisagrees = 1u << 31;
  static constexpr uint32_t kIndices = 1 << 7;
  static_assert(kMaxLength < kOlder && kMaxKnown <= kDistance / kOlder && kMaxLength < kUnknown / kDistance &&
                kMaxKnown <= kIndices && kUnknown / kOlder * kIndices < kNone / 2);

  __device__ static int index(int g) { return g * kWarp + lane_id(); }

  // Newer states first, the first of equally old ones. A lane's own number can be added later.
  __device__ uint32_t newest_first(int g, int lane) const {
    return (kMaxKnown - tally_[g] % kDistance / kOlder) * kIndices + static_cast<uint32_t>(g * kWarp + lane);
  }

  __device__ void leave_newest(int most, uint32_t (&words)[kGroups]) const {
    const int lane = lane_id();
    int newer[kGroups] = {};
#pragma unroll
    for (int from = 0; from < kGroups; ++from) {
      for (uint32_t left = words[from]; left != 0; left &= left - 1) {
        const uint32_t other = __shfl_sync(kFullWarp, newest_first(from, lane), __ffs(static_cast<int>(left)) - 1);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) newer[g] += other < newest_first(g, lane);
      }
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) words[g] &= __ballot_sync(kFullWarp, newer[g] < most);
  }

  // Drafts are newer than entries, in their order. Where nothing is remembered, no entry is known.
  __device__ void order_by_age(const KnownStates& known, bool nothing, Shared& shared) {
    const DraftPool pool = known.pool();
    int64_t age[kGroups], newest = 0;
    uint32_t older[kGroups] = {};
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int n = index(g) - known.drafts();
      age[g] = n < 0 ? INT64_MAX : n < known.entries() && !nothing ? pool.age[n] : 0;
    }
#pragma unroll 4
    for (int n = 0; n < known.entries(); ++n) {
      const int64_t other = nothing ? 0 : pool.age[n];
      newest = max(newest, other);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) older[g] += other > 0 && other < age[g];
    }
    if (threadIdx.x == 0) shared.clock = newest;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int k = index(g), n = k - known.drafts();
      int computed = 0;
      if (n < 0) {
        computed = shared.computed[k];
        older[g] += static_cast<uint32_t>(k);
      } else if (age[g] > 0) {
        computed = clamped(pool.computed[n] - shared.start, 0, known.length());
      }
      tally_[g] = static_cast<uint32_t>(computed) + kOlder * older[g];
      if (age[g] <= 0) tally_[g] = kUnknown;
    }
  }

  __device__ void compare_with_first(const KnownStates& known, const Window& window, Shared& shared) {
    constexpr uint32_t kConflict = 1 << 16;
    const bool alone = blockDim.x == kWarp;
    const int i = window.position;
    auto* of_drafts = reinterpret_cast<uint32_t*>(shared.probabilities);  // nothing is expected yet
    for (int k = i; !alone && k < kMaxKnown; k += static_cast<int>(blockDim.x)) shared.differences[k] = 0;
    if (!alone && i < kMaxDrafts) of_drafts[i] = 0;
    const int64_t first = known.state(0, i);
    int64_t before = first;
    uint32_t changes = 0;  // a one for each position that differs, two where it was filled, and the position
    const unsigned filled = __ballot_sync(kFullWarp, first != known.mask());
    uint32_t differences[kGroups] = {};
#pragma unroll 4
    for (int k = 0; k < known.count(); ++k) {
      const int64_t state = known.state(k, i);
      const unsigned word = __ballot_sync(kFullWarp, state != first);
      const int both = __popc(word) + static_cast<int>(kConflict) * __popc(word & filled);
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        if (index(g) == k) differences[g] = static_cast<uint32_t>(both);
      }
      if (k >= known.drafts()) continue;
      const unsigned changed = __ballot_sync(kFullWarp, state != before);
      const unsigned refilled = __ballot_sync(kFullWarp, state != before && before != known.mask());
      before = state;
      const int place = changed == 0 ? 0 : window.position - lane_id() + __ffs(static_cast<int>(changed)) - 1;
      const int one = static_cast<int>(kConflict) * (__popc(changed) + __popc(refilled));
      if (lane_id() == k) changes = static_cast<uint32_t>(one + place);
    }
    if (!alone) {
      __syncthreads();
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        if (differences[g] != 0) atomicAdd(&shared.differences[index(g)], differences[g]);
      }
      if (changes != 0) atomicAdd(&of_drafts[lane_id()], changes);
      __syncthreads();
      changes = of_drafts[lane_id()];
#pragma unroll
      for (int g = 0; g < kGroups; ++g) differences[g] = shared.differences[index(g)];
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      tally_[g] += kDistance * (differences[g] % kConflict) + (differences[g] < kConflict ? 0 : kDisagrees);
    }
    __syncwarp();  // other lanes have copied their tokens of draft 0
    adds_ = changes / kConflict == 1 ? static_cast<int>(changes % kConflict) : -1;
    filled_ = adds_ >= 0 && known.state(0, adds_) != known.mask();
  }

  uint32_t tally_[kGroups];
  int adds_;     // the position that this lane's draft adds to the draft before it; -1: none, or more than one
  bool filled_;  // whether it is filled in the state at work
};

}  // namespace freedave::cuda
