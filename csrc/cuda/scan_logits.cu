// One pass over the logits of the masked rows: the softmax of each chunk of the vocabulary, as a state.
//
// A block owns one chunk of the vocabulary (4096 or 16384 logits at a fixed place) of the masked rows it finds among
// its rows; a thread owns groups of 8 neighbouring logits, 128 groups apart, and loads four of them (64 or 128 bytes)
// before it computes. What a thread adds up depends on the vocabulary alone, so a row's bits do not depend on the
// batch, the grid or the alignment of its memory.
//
// Each logit is read once, at 7 instructions an element for a probability: memory-bound up to some 4e12 logits a
// second. A token that is drawn takes 13 more, all but two of them Philox.
#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/draw_token.cuh"
#include "cuda/logit_groups.cuh"
#include "cuda/scan_logits.h"
#include "freedave/online_softmax.h"
#include "freedave/predict_tokens.h"
#include "freedave/sampling.h"

namespace freedave::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kGroupsAhead = 4;  // loaded before any is used, so that enough bytes are in flight
constexpr int kQuadsAGroup = kGroup / kQuad;
constexpr int kQuadsAhead = kGroupsAhead * kQuadsAGroup;
constexpr int kSweep = kThreads * kGroup * kGroupsAhead;
static_assert(kChunk % kSweep == 0 && kTokensPerState % kSweep == 0);

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLog2ERest = 1.925963033500e-8f;  // log2 e - kLog2E
constexpr float kLn2 = 0.693147180559945309f;

// One bit a token of the chunk: suppressed tokens can be any number, so the hot loop must not walk their list.
using SuppressedBits = uint32_t[kChunk / 32];

// Of a row, where a token is drawn.
struct Draw {
  float scale, floor;
  NoiseKey key;
};

// The group as floats; where a token is drawn, scaled by the temperature. kHide: suppressed tokens and what is below
// the floor are at -inf: their logits do not count, not even a NaN.
template <bool kHide, bool kDrawn, typename T>
__device__ __forceinline__ void values_of(const Group<T>& group, int first, const SuppressedBits& suppressed,
                                          const Draw& draw, float (&x)[kGroup]) {
  unpack(group, x);
  if constexpr (kDrawn) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x[i] = kHide && x[i] < draw.floor ? -INFINITY : x[i] * draw.scale;
  }
  if constexpr (kHide) {
    const uint32_t bits = suppressed[first / 32] >> (first % 32);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x[i] = bits >> i & 1 ? -INFINITY : x[i];
  }
}

// 2^64 exp(x - reference) for x <= reference, to 3e-7 however far below it lies: in a confident row the entropy
// consists of such terms only. `difference` is x - reference, rounded. 0 below e^-131.
__device__ __forceinline__ float large_exp(float x, float reference, float& difference) {
  const float d = x - reference;
  difference = d;
  const float minus_reference = d - x;
  const float lost = (x - (d - minus_reference)) - (reference + minus_reference);
  const float y = d * kLog2E;
  const float rest = fmaf(d, kLog2E, -y) + d * kLog2ERest;
  if (y < -189.0f) return 0.0f;  // also keeps -inf out of what follows; a NaN goes on
  const float whole = rintf(y);
  const float power = exp2_flushed(y - whole);
  const float scale = float_from_bits(static_cast<uint32_t>(static_cast<int>(whole) + 64 + 127) << 23);
  return power * scale * fmaf(rest, kLn2, 1.0f + lost);
}

__device__ __forceinline__ void terms_of(const float (&x)[kGroup], float reference, float (&e)[kGroup]) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) e[i] = exp2_flushed((x[i] - reference) * kLog2E);
}

// Pairwise, then one addition a group: short chains of roundings.
__device__ __forceinline__ float sum_of(const float (&e)[kGroup]) {
  return ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]));
}

// What a thread knows of the logits it has seen.
template <Measure kMeasure>
struct Seen {
  float max = -INFINITY;
  int sweep = 0;     // where max first appeared
  float sum = 0.0f;  // of exp(x - max)
  // The log-odds only: the same of that sweep, which is not in sum. At the end it is summed again without the token
  // that has max, beside whose 1 the others were rounded.
  float top_sum = 0.0f;
  // The margin only.
  float second = -INFINITY;
  // The entropy only: see OnlineSoftmax.
  double ties = 0.0, rest = 0.0, weighted = 0.0;

  // The reference of the exponentials. Finite where max is not: -inf minus itself would be a NaN.
  __device__ float reference() const { return fmaxf(max, -FLT_MAX); }

  // Takes a larger maximum, and says whether it is one; terms summed so far become relative to it. What is in top_sum
  // goes to sum, and is to be replaced.
  __device__ bool raise(float larger, int at) {
    const bool leads = larger > max;
    if constexpr (needs_entropy_terms(kMeasure)) {
      if (leads) {
        const double shift = static_cast<double>(reference()) - static_cast<double>(larger);
        const double scale = exp(shift);
        const double terms = ties + rest;
        weighted = terms > 0.0 ? scale * (weighted + shift * terms) : 0.0;
        rest *= scale;
        rest += ties * scale;
        ties = 0.0;
      }
    } else {
      const float before = reference();
      const float after = fmaxf(larger, before);
      if (needs_others(kMeasure) && leads) sum += top_sum;
      sum *= exp2_flushed((before - after) * kLog2E);
    }
    sweep = leads ? at : sweep;
    max = fmaxf(max, larger);
    return leads;
  }

  // The entropy's terms of a group.
  __device__ void add(const float (&x)[kGroup]) {
    const float top = reference();
    float tied = 0.0f, terms = 0.0f, weights = 0.0f;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      float difference;
      const float term = large_exp(x[i], top, difference);
      const bool is_top = x[i] == top;
      tied += is_top ? 1.0f : 0.0f;
      terms += is_top ? 0.0f : term;
      weights += is_top || term == 0.0f ? 0.0f : term * difference;
    }
    ties += tied;
    rest += 0x1p-64 * static_cast<double>(terms);
    weighted += 0x1p-64 * static_cast<double>(weights);
  }

  // The sum of exp(x - reference()) of a sweep, which leads where it raised the maximum.
  __device__ void add(float terms, bool leads) {
    if (needs_others(kMeasure) && leads) {
      top_sum = terms;
    } else {
      sum += terms;
    }
  }
};

template <bool kDrawn>
struct Choices {};

template <>
struct Choices<true> {
  NoisyChoice choice[kWarps];
  int32_t bar;  // of all threads, while they draw
};

template <Measure kMeasure, bool kDrawn>
struct Scratch : Choices<kDrawn> {
  float max[kWarps];
  float second[kWarps];
  uint32_t token[kWarps];
  float sum[kWarps];
  double ties[kWarps], rest[kWarps], weighted[kWarps];
};

// The largest logit of a group, and with the margin the second largest, equal ones counted twice.
template <Measure kMeasure>
__device__ __forceinline__ void look_at(const float (&x)[kGroup], float& largest, float& second) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    if constexpr (needs_second(kMeasure)) second = fmaxf(second, fminf(x[i], largest));
    largest = fmaxf(largest, x[i]);
  }
}

// The lowest token of this thread whose logit is `wanted`; kNone when it has none. Reads again only the sweep in which
// the thread saw its maximum.
constexpr uint32_t kNone = 0xffffffffu;

template <bool kAligned, bool kHide, bool kDrawn, typename T>
__device__ __forceinline__ uint32_t find(const T* chunk, int size, int sweep, float wanted,
                                         const SuppressedBits& suppressed, const Draw& draw) {
  uint32_t found = kNone;
  for (int g = 0; g < kGroupsAhead && found == kNone; ++g) {
    const int first = sweep + (g * kThreads + static_cast<int>(threadIdx.x)) * kGroup;
    float x[kGroup];
    values_of<kHide, kDrawn>(load_group<kAligned>(chunk, first, size), first, suppressed, draw, x);
    // Backwards, so that the lowest stands at the end.
    for (int i = kGroup - 1; i >= 0; --i) {
      if (first + i < size && x[i] == wanted) found = static_cast<uint32_t>(first + i);
    }
  }
  return found;
}

// Sum of exp(x - reference) over what this thread has of a sweep but for one token.
template <bool kAligned, bool kHide, bool kDrawn, typename T>
__device__ __forceinline__ float terms_beside(uint32_t token, const T* chunk, int size, int sweep, float reference,
                                              const SuppressedBits& suppressed, const Draw& draw) {
  float sum = 0.0f;
#pragma unroll 1
  for (int g = 0; g < kGroupsAhead; ++g) {
    const int first = sweep + (g * kThreads + static_cast<int>(threadIdx.x)) * kGroup;
    float x[kGroup];
    values_of<kHide, kDrawn>(load_group<kAligned>(chunk, first, size), first, suppressed, draw, x);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) x[i] = static_cast<uint32_t>(first + i) == token ? -INFINITY : x[i];
    float e[kGroup];
    terms_of(x, reference, e);
    sum += sum_of(e);
  }
  return sum;
}

// Draws from a sweep, of whose quads `top` are the largest logits. The quad whose bound is the largest comes first:
// after it, few have a bound that is worth a look.
template <bool kAligned, bool kHide, typename T>
__device__ __forceinline__ void draw_from(const float (&top)[kQuadsAhead], const T* chunk, int size, int sweep,
                                          int64_t first_token, const SuppressedBits& suppressed, const Draw& draw,
                                          Drawn& drawn, int32_t& block_bar) {
  const int mine = sweep + static_cast<int>(threadIdx.x) * kGroup;
  const uint32_t first_quad = static_cast<uint32_t>(first_token / kQuad) + static_cast<uint32_t>(mine) / kQuad;
  float most[kQuadsAhead];
#pragma unroll
  for (int q = 0; q < kQuadsAhead; ++q) {
    const uint32_t quad = first_quad + q / kQuadsAGroup * kThreads * kQuadsAGroup + q % kQuadsAGroup;
    most[q] = most_noisy(top[q], smallest_word(draw.key.words(quad)));
  }
#pragma unroll 1
  for (float best = largest_of(most); __any_sync(kFullWarp, drawn.may_win(best)); best = largest_of(most)) {
    if (drawn.may_win(best)) {
      const int q = take(best, most);
      const int first = mine + q / kQuadsAGroup * kThreads * kGroup;
      float x[kGroup], quad[kQuad];
      values_of<kHide, true>(load_group<kAligned>(chunk, first, size), first, suppressed, draw, x);
#pragma unroll
      for (int r = 0; r < kQuad; ++r) quad[r] = q % kQuadsAGroup == 0 ? x[r] : x[kQuad + r];
      drawn.consider(quad, first_token + first + q % kQuadsAGroup * kQuad, draw.key);
    }
    drawn.share(block_bar);
  }
}

// A thread's groups of a sweep from its first one on; `size` logits are left of the chunk. Most sweeps are whole, and
// need no comparison for each group.
template <bool kAligned, typename T>
__device__ __forceinline__ void load_sweep(const T* first, int size, bool whole, Group<T> (&group)[kGroupsAhead]) {
  constexpr int kStep = kThreads * kGroup;
  if (kAligned && whole) {
#pragma unroll
    for (int g = 0; g < kGroupsAhead; ++g) group[g] = load_group<true>(first, g * kStep, (g + 1) * kStep);
  } else {
#pragma unroll
    for (int g = 0; g < kGroupsAhead; ++g) group[g] = load_group<kAligned>(first, g * kStep, size);
  }
}

// What each thread sees of a chunk.
template <typename T, Measure kMeasure, bool kAligned, bool kHide, bool kDrawn>
__device__ __forceinline__ Seen<kMeasure> sweep_chunk(const T* chunk, int size, int64_t first_token,
                                                      const SuppressedBits& suppressed, const Draw& draw, Drawn& drawn,
                                                      Choices<kDrawn>& shared) {
  Seen<kMeasure> seen;
  const T* at = chunk + threadIdx.x * kGroup;
  for (int sweep = 0; sweep < size; sweep += kSweep, at += kSweep) {
    const int mine = sweep + static_cast<int>(threadIdx.x) * kGroup;
    Group<T> group[kGroupsAhead];
    load_sweep<kAligned>(at, size - mine, sweep + kSweep <= size, group);
    float x[kGroupsAhead][kGroup], top[kQuadsAhead];
    float largest = needs_second(kMeasure) ? seen.max : -INFINITY;
#pragma unroll
    for (int g = 0; g < kGroupsAhead; ++g) {
      values_of<kHide, kDrawn>(group[g], mine + g * kThreads * kGroup, suppressed, draw, x[g]);
      if constexpr (kDrawn) {
        for (int q = 0; q < kQuadsAGroup; ++q) top[g * kQuadsAGroup + q] = largest_of_quad(x[g] + q * kQuad);
      } else {
        look_at<kMeasure>(x[g], largest, seen.second);
      }
    }
    if constexpr (kDrawn) largest = largest_of(top);
    const bool leads = seen.raise(largest, sweep);
    if constexpr (needs_entropy_terms(kMeasure)) {
#pragma unroll
      for (int g = 0; g < kGroupsAhead; ++g) seen.add(x[g]);
    } else {
      float terms = 0.0f;
#pragma unroll
      for (int g = 0; g < kGroupsAhead; ++g) {
        float e[kGroup];
        terms_of(x[g], seen.reference(), e);
        terms = g == 0 ? sum_of(e) : terms + sum_of(e);
      }
      seen.add(terms, leads);
    }
    if constexpr (kDrawn) {
      if (__any_sync(kFullWarp, drawn.may_win(largest + kLargestNoise))) {
        draw_from<kAligned, kHide>(top, chunk, size, sweep, first_token, suppressed, draw, drawn, shared.bar);
      }
    }
  }
  return seen;
}

// One chunk of one row, by the whole block; thread 0 has the result.
template <typename T, Measure kMeasure, bool kAligned, bool kDrawn, bool kHide>
__device__ __forceinline__ OnlineSoftmax scan_chunk(const T* chunk, int size, int64_t first_token,
                                                    const SuppressedBits& suppressed, const Draw& draw,
                                                    Scratch<kMeasure, kDrawn>& scratch) {
  Drawn drawn;
  if constexpr (kDrawn) drawn.hear(scratch.bar);
  Seen<kMeasure> seen =
      sweep_chunk<T, kMeasure, kAligned, kHide, kDrawn>(chunk, size, first_token, suppressed, draw, drawn, scratch);

  // The block's maximum, and every thread's terms relative to it.
  const float warp_top = warp_max(seen.max);
  if (lane_id() == 0) scratch.max[warp_id()] = warp_top;
  __syncthreads();
  float top = scratch.max[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) top = fmaxf(top, scratch.max[w]);

  uint32_t token = kNone;
  if (seen.max == top && top > -INFINITY) {
    token = find<kAligned, kHide, kDrawn>(chunk, size, seen.sweep, top, suppressed, draw);
  }
  const bool has_top = token != kNone;
  if constexpr (needs_others(kMeasure)) {
    if (has_top) {
      seen.top_sum = terms_beside<kAligned, kHide, kDrawn>(token, chunk, size, seen.sweep, top, suppressed, draw);
    }
    const uint32_t threads = __ballot_sync(kFullWarp, has_top);
    if (lane_id() == 0) scratch.ties[warp_id()] = __popc(threads);
  }
  token = __reduce_min_sync(kFullWarp, token);
  if (lane_id() == 0) scratch.token[warp_id()] = token;
  if constexpr (kDrawn) {
    const float best = float_of(ordered(__reduce_max_sync(kFullWarp, ordered(bits_of(drawn.choice.noisy)))));
    const bool is_best = drawn.choice.token >= 0 && drawn.choice.noisy == best;
    const uint32_t place = is_best ? static_cast<uint32_t>(drawn.choice.token - first_token) : kNone;
    const uint32_t lowest = __reduce_min_sync(kFullWarp, place);
    if (place == lowest && (lowest != kNone || lane_id() == 0)) scratch.choice[warp_id()] = drawn.choice;
  }

  const float own_max = seen.max;
  if (seen.raise(top, 0)) seen.top_sum = 0.0f;
  if constexpr (needs_entropy_terms(kMeasure)) {
    const double ties = warp_sum(seen.ties), rest = warp_sum(seen.rest), weighted = warp_sum(seen.weighted);
    if (lane_id() == 0) {
      scratch.ties[warp_id()] = ties;
      scratch.rest[warp_id()] = rest;
      scratch.weighted[warp_id()] = weighted;
    }
  } else {
    const float sum = warp_sum(needs_others(kMeasure) ? seen.sum + seen.top_sum : seen.sum);
    if (lane_id() == 0) scratch.sum[warp_id()] = sum;
  }
  __syncthreads();

  OnlineSoftmax whole = empty_softmax();
  token = scratch.token[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) token = token < scratch.token[w] ? token : scratch.token[w];
  if constexpr (needs_second(kMeasure)) {
    // The second largest is the largest of all but the one logit that was chosen.
    const bool chose = has_top && static_cast<int>(token / kGroup % kThreads) == static_cast<int>(threadIdx.x);
    const float other = warp_max(chose ? seen.second : own_max);
    if (lane_id() == 0) scratch.second[warp_id()] = other;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    whole.max = top;
    whole.token = token == kNone ? -1 : first_token + token;
    for (int w = 0; w < kWarps; ++w) {
      if constexpr (needs_entropy_terms(kMeasure)) {
        whole.ties += scratch.ties[w];
        whole.rest += scratch.rest[w];
        whole.weighted += scratch.weighted[w];
      } else {
        whole.rest += static_cast<double>(scratch.sum[w]);
      }
      if constexpr (needs_others(kMeasure)) whole.ties += scratch.ties[w];
      if constexpr (needs_second(kMeasure)) whole.second = fmaxf(whole.second, scratch.second[w]);
    }
    if constexpr (kDrawn) {
      NoisyChoice best = scratch.choice[0];
      for (int w = 1; w < kWarps; ++w) best = first_of(scratch.choice[w], best);
      // Where nothing was drawn, it is the largest logit.
      set_choice(whole, best.token < 0 ? NoisyChoice{top, top, whole.token} : best);
    }
    if (needs_others(kMeasure) && token != kNone) {  // one of the threads' maxima is the chosen token
      whole.rest += whole.ties - 1.0;
      whole.ties = 1.0;
    }
  }
  return whole;
}

// Sets the bits of the suppressed tokens among the `size` tokens from `first`, and says whether there are any.
__device__ __forceinline__ bool mark_suppressed(const LogitsToScan& p, int64_t first, int size, SuppressedBits& bits) {
  for (int i = static_cast<int>(threadIdx.x); i < kChunk / 32; i += kThreads) bits[i] = 0;
  __syncthreads();
  bool any = false;
  for (int64_t s = threadIdx.x; s < p.num_suppress_tokens; s += kThreads) {
    const int64_t token = p.suppress_tokens[s * p.suppress_tokens_step] - first;
    if (token < 0 || token >= size) continue;
    atomicOr(&bits[token / 32], 1u << (token % 32));
    any = true;
  }
  return __syncthreads_or(any);
}

__device__ __forceinline__ bool is_masked(const LogitsToScan& p, int64_t row, int64_t position) {
  return p.mask_index.data ? p.mask_index.at(row, position) : p.input_ids.at(row, position) == p.mask_token_id;
}

// A flat index over [*, L], split. Row counts fit in 32 bits, where a division is a tenth of the instructions.
struct Place {
  int64_t row, position;
};

__device__ __forceinline__ Place place_of(const LogitsToScan& p, uint32_t flat) {
  const uint32_t length = static_cast<uint32_t>(p.length);
  return {flat / length, flat % length};
}

// Blocks that an SM must have room for. This caps the registers of a thread: low enough that many loads are in flight,
// high enough that nothing spills.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kDrawingBlocks = 4;  // with 5, one kernel spills
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kDrawingBlocks = 5;  // with 6, likewise
#else
constexpr int kDrawingBlocks = 6;
#endif
constexpr int blocks_per_sm(Measure measure, bool drawn) {
  return drawn ? kDrawingBlocks : needs_entropy_terms(measure) ? 6 : 8;
}

template <typename T, Measure kMeasure, bool kAligned, bool kDrawn>
__global__ void __launch_bounds__(kThreads, blocks_per_sm(kMeasure, kDrawn))
    scan_chunks(const __grid_constant__ LogitsToScan p, double* __restrict__ states, uint32_t rows, int chunk_size) {
  FREEDAVE_SHARED(SuppressedBits, suppressed);
  using Memory = Scratch<kMeasure, kDrawn>;
  FREEDAVE_SHARED(Memory, scratch);
  let_next_kernel_launch();
  wait_for_previous_kernel();

  const int64_t first = static_cast<int64_t>(blockIdx.x) * chunk_size;
  const int64_t first_token = p.first_token_id + first;
  const int size = static_cast<int>(chunk_size < p.vocab - first ? chunk_size : p.vocab - first);
  const bool may_hide = p.num_suppress_tokens > 0 || (kDrawn && p.floor.data);
  const bool suppress = may_hide && mark_suppressed(p, first_token, size, suppressed);
  const auto state_of = [&](uint32_t row) {
    return states + (static_cast<int64_t>(row) * gridDim.x + blockIdx.x) * kStateFields;
  };

  // A block takes the rows blockIdx.y, blockIdx.y + gridDim.y, ... A lane reads the id of one, so a warp reads 32 in
  // one load. Rows that are not masked store the neutral state and do nothing else.
  for (uint32_t base = blockIdx.y; base < rows; base += kWarp * gridDim.y) {
    const uint32_t candidate = base + lane_id() * gridDim.y;
    const Place place = place_of(p, candidate);
    const bool inside = candidate < rows;
    const bool is_open = inside && is_masked(p, place.row, place.position);
    if (inside && !is_open && warp_id() == 0) store_state(empty_softmax(), state_of(candidate));
    uint32_t masked = __ballot_sync(kFullWarp, is_open);
    for (; masked != 0; masked &= masked - 1) {
      const uint32_t row = base + static_cast<uint32_t>(__ffs(static_cast<int>(masked)) - 1) * gridDim.y;
      const bool shifted = p.logits_shift && row % static_cast<uint32_t>(p.length) > 0;
      const T* chunk = static_cast<const T*>(p.logits) + p.logit_rows.start(row - shifted) + first;
      Draw draw{};
      if constexpr (kDrawn) {
        const Place at = place_of(p, row);
        draw = {float_from_bits(same_in_warp(static_cast<uint32_t>(bits_of(p.scale_at(at.row, at.position))))),
                p.floor_at(at.row, at.position),
                {same_in_warp(static_cast<uint64_t>(p.seed.at(at.row, at.position))),
                 same_in_warp(static_cast<uint64_t>(p.position.at(at.row, at.position)))}};
        if (threadIdx.x == 0) scratch.bar = p.draws_at(at.row, at.position) ? Drawn::kLowestBar : Drawn::kNoToken;
        __syncthreads();
      }
      const OnlineSoftmax partial =
          suppress || (kDrawn && draw.floor > -INFINITY)
              ? scan_chunk<T, kMeasure, kAligned, kDrawn, true>(chunk, size, first_token, suppressed, draw, scratch)
              : scan_chunk<T, kMeasure, kAligned, kDrawn, false>(chunk, size, first_token, suppressed, draw, scratch);
      if (threadIdx.x == 0) store_state(partial, state_of(row));
      __syncthreads();  // the next row uses the same scratch
    }
  }
}

using ScanKernel = void (*)(LogitsToScan, double*, uint32_t, int);

template <typename T, Measure kMeasure>
ScanKernel scan_kernel(bool aligned, bool drawn) {
  if constexpr (measures_draws(kMeasure)) {
    if (drawn) return aligned ? scan_chunks<T, kMeasure, true, true> : scan_chunks<T, kMeasure, false, true>;
  }
  if (drawn) return nullptr;
  return aligned ? scan_chunks<T, kMeasure, true, false> : scan_chunks<T, kMeasure, false, false>;
}

template <typename T>
ScanKernel scan_kernel(const LogitsToScan& p) {
  const bool aligned = is_aligned(p.logits, p.logit_rows, p.vocab, sizeof(T)), drawn = p.drawn();
  switch (p.measure) {
    case Measure::kProb:
      return scan_kernel<T, Measure::kProb>(aligned, drawn);
    case Measure::kMargin:
      return scan_kernel<T, Measure::kMargin>(aligned, drawn);
    case Measure::kNegEntropy:
      return scan_kernel<T, Measure::kNegEntropy>(aligned, drawn);
    case Measure::kLogOdds:
      return scan_kernel<T, Measure::kLogOdds>(aligned, drawn);
  }
  return nullptr;
}

// Null for what is no type of logits, or no measure of what is wanted.
ScanKernel scan_kernel_for(const LogitsToScan& p) {
  switch (p.logit_type) {
    case LogitType::kFloat32:
      return scan_kernel<float>(p);
    case LogitType::kBFloat16:
      return scan_kernel<BFloat16>(p);
    case LogitType::kFloat16:
      return scan_kernel<Float16>(p);
  }
  return nullptr;
}

}  // namespace

cudaError_t scan_logits(const LogitsToScan& p, int64_t chunk_size, double* states, cudaStream_t stream) {
  const int64_t rows = p.input_ids.rows.count * p.length, chunks = chunks_of(p.vocab, chunk_size);
  if (rows == 0) return cudaSuccess;
  if (rows > INT32_MAX) return cudaErrorInvalidValue;

  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  // Some 4 waves of blocks. The number is odd, so that the rows of a block are different positions of a window: most
  // masked positions are near its end, and a block that had only those would be the last to finish.
  const int64_t wanted = std::min<int64_t>(rows, 64 * processors / chunks) | 1;
  const dim3 grid(static_cast<unsigned>(chunks), static_cast<unsigned>(std::min<int64_t>(wanted, 65535)));

  const ScanKernel kernel = scan_kernel_for(p);
  if (kernel == nullptr) return cudaErrorInvalidValue;
  return launch_kernel(kernel, grid, kThreads, stream, p, states, static_cast<uint32_t>(rows),
                       static_cast<int>(chunk_size));
}

}  // namespace freedave::cuda
