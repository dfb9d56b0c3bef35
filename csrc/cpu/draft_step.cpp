// Everything between two forwards: which drafts were right, what is final, and the next drafts. A thread owns a
// sequence; its state is a few kilobytes, so the op is bound by the latency of small scans, not by memory.
#include "freedave/draft_step.h"
#include "cpu/drafting.h"
#include "cpu/parallel.h"
#include "cpu/record.h"

namespace freedave::cpu {
namespace {

// One sequence: its input drafts and predictions as contiguous rows, and room to work.
struct Sequence {
  const int64_t* drafts;
  const int64_t* token_ids;
  const float* confidence;
  int64_t num_drafts;
  int64_t step;
  StepRule rule;

  // Of position `place` of all drafts, one after the other.
  float confidence_at(int64_t place) const {
    return confidence_in(token_ids[place], confidence[place], rule.mask_token_id);
  }
};

struct Scratch {
  std::vector<int64_t> drafts, token_ids, target, ends, chain, distance;
  std::vector<float> confidence;
  Keys keys;
};

Sequence load(const DraftStepParams& p, int64_t b, Scratch& scratch) {
  const int64_t count = p.input_drafts;
  return {contiguous_drafts(p.drafts, b, count, p.length, scratch.drafts),
          contiguous_drafts(p.token_ids, b, count, p.length, scratch.token_ids),
          contiguous_drafts(p.confidence, b, count, p.length, scratch.confidence),
          std::clamp<int64_t>(p.num_drafts.at(b), 1, count),  // draft 0 is right by construction
          p.step.data ? p.step.at(b) : 0,
          p.rules.of(b)};
}

// Recycled drafts: draft 0 stands at `drafts` already; each further one takes the predictions of the input draft
// nearest to the one before it. A draft differs from the one before in the picked positions, so the distances are
// updated, not recomputed. Returns the number of drafts.
int64_t recycle(const DraftStepParams& p, const Sequence& s, int64_t accepted, int64_t* drafts, Scratch& scratch) {
  const int64_t length = p.length;
  const int64_t mask = p.rules.mask_token_id;
  const int64_t picks = s.rule.has_threshold ? 1 : s.rule.tokens_per_step;
  std::vector<int64_t>& distance = scratch.distance;
  distance.assign(s.num_drafts, 0);
  for (int64_t j = 0; j < s.num_drafts; ++j) {
    for (int64_t i = 0; i < length; ++i) distance[j] += s.drafts[j * length + i] != drafts[i];
  }

  int64_t built = 1;
  for (; built < p.draft_steps; ++built) {
    // The lowest index among equal distances.
    const int64_t nearest = std::min_element(distance.begin(), distance.end()) - distance.begin();
    const int64_t* before = drafts + (built - 1) * length;
    const auto source = [&](int64_t i) {
      return (s.drafts[nearest * length + i] == mask ? nearest : accepted) * length;
    };
    const auto is_masked = [&](int64_t i) { return before[i] == mask; };
    const auto confidence = [&](int64_t i) { return s.confidence_at(source(i) + i); };
    scratch.keys.clear();
    collect(is_masked, confidence, current_block(is_masked, p.rules.block_length, length), p.rules.order, scratch.keys);
    const int64_t filled = std::min(picks, static_cast<int64_t>(scratch.keys.size()));
    if (filled == 0) break;
    sort_first(scratch.keys.begin(), scratch.keys.end(), filled);

    int64_t* draft = drafts + built * length;
    std::copy_n(before, length, draft);
    for (int64_t n = 0; n < filled; ++n) {
      const int64_t i = position_of(scratch.keys[n]);
      const int64_t token = s.token_ids[source(i) + i];
      draft[i] = token;
      for (int64_t j = 0; j < s.num_drafts; ++j) {
        const int64_t there = s.drafts[j * length + i];
        distance[j] += (there != token) - (there != mask);
      }
    }
  }
  for (int64_t k = built; k < p.draft_steps; ++k)
    std::copy_n(drafts + (built - 1) * length, length, drafts + k * length);
  return built;
}

// The static step that committed each position, the steps taken, and what they committed. `chain` lists the drafts that
// the hops visited; the last step leads to the new draft 0. A step that fills no position is not counted: where nothing
// can be ranked, a draft is its own target.
void write_step_map(const DraftStepParams& p, const Sequence& s, const int64_t* committed,
                    const std::vector<int64_t>& chain, const Record& record) {
  const int64_t mask = p.rules.mask_token_id;
  int64_t* step_map = record.step_map;
  std::fill(step_map, step_map + p.length, -1);
  int64_t steps = 0;
  for (size_t hop = 1; hop <= chain.size(); ++hop) {
    const int64_t* state = hop < chain.size() ? s.drafts + chain[hop] * p.length : committed;
    bool filled = false;
    for (int64_t i = 0; i < p.length; ++i) {
      if (s.drafts[i] != mask || step_map[i] >= 0 || state[i] == mask) continue;
      step_map[i] = steps;
      filled = true;
    }
    steps += filled;
  }
  int64_t tokens_committed = 0;
  for (int64_t i = 0; i < p.length; ++i) {
    step_map[i] = step_map[i] < 0 || committed[i] == mask ? -1 : step_map[i] + s.step;
    tokens_committed += step_map[i] >= 0;
  }
  record.counters[static_cast<int>(Counter::kSteps)] = steps;
  record.counters[static_cast<int>(Counter::kTokensCommitted)] = tokens_committed;
}

// What the accepted draft says: how much of its prefix is complete, so that its keys and values can be kept, and the
// lowest position of its current block that has no prediction.
void count_accepted(const DraftStepParams& p, const int64_t* state, const Record& record) {
  const auto is_masked = [&](int64_t i) { return state[i] == p.rules.mask_token_id; };
  const Span block = current_block(is_masked, p.rules.block_length, p.length);
  int64_t non_finite = block.begin;
  while (non_finite < block.end && !(is_masked(non_finite) && !is_rankable(record.confidence[non_finite])))
    ++non_finite;
  record.counters[static_cast<int>(Counter::kPrefixLength)] = block.begin;
  record.counters[static_cast<int>(Counter::kNonFinite)] = non_finite < block.end ? non_finite : -1;
}

void step_sequence(const DraftStepParams& p, int64_t b, Scratch& scratch) {
  const int64_t length = p.length;
  const Sequence s = load(p, b, scratch);

  // Verify. A draft's target is one static step from it; only those on the accepted chain are worked out.
  scratch.chain.clear();
  scratch.target.resize(length);
  const auto draft_of = [&](int64_t k) { return s.drafts + k * length; };
  const auto target_of = [&](int64_t k) {
    const int64_t* token_ids = s.token_ids + k * length;
    plan_drafts(draft_of(k), token_ids, s.confidence + k * length, length, s.rule, 1, scratch.keys, scratch.ends);
    write_drafts(draft_of(k), token_ids, length, 1, scratch.keys, scratch.ends, scratch.target.data());
    return static_cast<const int64_t*>(scratch.target.data());
  };
  const int64_t accepted = accept_chain(
      draft_of, target_of, [&](int64_t k) { scratch.chain.push_back(k); }, s.num_drafts, length, p.match,
      p.rules.mask_token_id);

  // Carry the accepted predictions over, and draft again from the accepted state.
  const int64_t* state = draft_of(accepted);
  const int64_t* token_ids = s.token_ids + accepted * length;
  const Record record = record_of(p, b);
  std::copy_n(token_ids, length, record.token_ids);
  for (int64_t i = 0; i < length; ++i) record.confidence[i] = s.confidence_at(accepted * length + i);
  std::fill(record.confidence + length, record.confidence + record.confidence_end, 0.0f);
  int64_t* next = record.drafts;
  const bool recycled = p.drafting == Drafting::kRecycled;
  int64_t num_drafts = plan_drafts(state, token_ids, record.confidence, length, s.rule, recycled ? 1 : p.draft_steps,
                                   scratch.keys, scratch.ends);
  const bool keep_recycling = recycled && num_drafts > 0;
  write_drafts(state, token_ids, length, keep_recycling ? 1 : p.draft_steps, scratch.keys, scratch.ends, next);
  if (keep_recycling) num_drafts = recycle(p, s, accepted, next, scratch);

  // Account for it. The new draft 0 is right by construction, so it is the committed state.
  const auto count = [&](Counter column) -> int64_t& { return record.counters[static_cast<int>(column)]; };
  count(Counter::kAccepted) = accepted;
  write_step_map(p, s, next, scratch.chain, record);
  count_accepted(p, state, record);
  count_committed(p, s.rule, next, p.answer_start.data ? p.answer_start.at(b) : 0, record.counters);
  count(Counter::kForwardDrafts) = count_forward_drafts(p, next, num_drafts);
  count(Counter::kNumDrafts) = num_drafts;
}

}  // namespace

void launch(const DraftStepParams& p, ParallelFor run) {
  const int64_t work = p.length * 4 * (p.input_drafts + p.draft_steps + 2);
  parallel_for(run, p.batch, grain_for(work), [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    for (int64_t b = begin; b < end; ++b) step_sequence(p, b, scratch);
  });
}

}  // namespace freedave::cpu
