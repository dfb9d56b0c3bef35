// Verification through all states whose predictions are known, and the next drafts from the nearest of them. A thread
// owns a sequence. Its states are kept as the pool keeps them, a row of columns each. How far each is from the state at
// work is kept up to date as that is filled, so that finding it among them (at distance 0) costs no comparison.
#include "freedave/pooled_step.h"
#include "cpu/drafting.h"
#include "cpu/parallel.h"
#include "cpu/record.h"

namespace freedave::cpu {
namespace {

// A state that was forwarded, and what was predicted at it.
struct Known {
  const int64_t* state;
  const int64_t* token_ids;
  const float* confidence;
  int64_t computed;  // leading window positions whose predictions are known
  int64_t age;
  int64_t place;  // an input draft's index, or that of an entry of the pool
};

// Static decoding came to known state `known` and filled there the picks [begin, end).
struct Hop {
  int64_t known, begin, end;
};

// What filling a column does to the confidences elsewhere was measured: drafts `draft - 1` and `draft` differ in it
// alone.
struct Effect {
  int64_t column, draft;
};

struct Candidate {
  float score;
  int64_t picks;  // on the way to it
};

struct Scratch {
  std::vector<int64_t> states, token_ids, state, expected, distance;
  std::vector<float> confidence, sure, heap;
  std::vector<Known> known;
  std::vector<int64_t> kept, picks, chosen, foreseen_by;
  std::vector<Effect> effects;
  std::vector<Hop> path;
  std::vector<Candidate> candidates;
  Keys keys;
  std::vector<int64_t> drafts_copy, token_ids_copy;
  std::vector<float> confidence_copy;
};

// A sequence at work. Positions are those of the window; everything in rows is by column.
class Sequence {
 public:
  Sequence(const PooledStepParams& p, int64_t b, Scratch& scratch)
      : p_(p.step),
        rule_(p.step.rules.of(b)),
        entries_(p.pool_entries),
        columns_(p.pool_columns),
        pipelined_(p.drafting == PooledDrafting::kPipelined),
        scratch_(scratch),
        b_(b) {
    pool_ = pool_of(p, std::clamp<int64_t>(p.slots.data ? p.slots.at(b) : b, 0, p.pool_slots - 1));
    start_ = p.window_start.data ? p.window_start.at(b) : 0;
    origin_ = column_of(start_, columns_);
    answer_start_ = p_.answer_start.data ? p_.answer_start.at(b) : 0;
    step_ = p_.step.data ? p_.step.at(b) : 0;
    enter(p.forget.data && p.forget.at(0, b));
    load(p);
  }

  void run() {
    verify();
    choose_kept();
    const Record record = record_of(p_, b_);
    write_window(scratch_.state.data(), record.drafts);  // the committed state is the next draft 0
    int64_t num_drafts = 0;
    if (scratch_.path.back().end > scratch_.path.back().begin) {  // else nothing can be filled
      walk();
      num_drafts = write_drafts(record.drafts);
    }
    for (int64_t k = std::max<int64_t>(num_drafts, 1); k < p_.draft_steps; ++k)
      std::copy_n(record.drafts + (k - 1) * p_.length, p_.length, record.drafts + k * p_.length);
    write_record(record, num_drafts);
    write_pool();  // last: the path may lead through entries that go
  }

 private:
  int64_t mask() const { return rule_.mask_token_id; }
  int64_t columns() const { return columns_; }
  int64_t column(int64_t position) const {
    const int64_t c = origin_ + position;
    return c < columns() ? c : c - columns();
  }

  // A row by column from one by position; what the window does not have is `beyond`.
  template <typename T>
  void to_columns(const T* window, T beyond, T* row) const {
    const int64_t before_wrap = std::min(p_.length, columns() - origin_);
    if (p_.length < columns()) std::fill(row, row + columns(), beyond);
    std::copy_n(window, before_wrap, row + origin_);
    std::copy_n(window + before_wrap, p_.length - before_wrap, row);
  }

  template <typename T>
  void write_window(const T* row, T* window) const {
    const int64_t before_wrap = std::min(p_.length, columns() - origin_);
    std::copy_n(row + origin_, before_wrap, window);
    std::copy_n(row, p_.length - before_wrap, window + before_wrap);
  }

  // The window may have slid since the last call: positions that it left make room for new ones. A jump is a new start.
  void enter(bool forget) {
    const int64_t moved = start_ - *pool_.start;
    const bool slid = moved >= 0 && moved < columns();
    int64_t* age = pool_.age;
    if (forget || !slid) std::fill(age, age + entries_, 0);
    for (int64_t i = 0; slid && i < moved; ++i) {
      const int64_t c = column_of(*pool_.start + i, columns());
      for (int64_t n = 0; n < entries_; ++n) {
        const int64_t place = n * columns() + c;
        pool_.states[place] = pool_.token_ids[place] = mask();
        pool_.confidence[place] = -INFINITY;
      }
    }
    *pool_.start = start_;
  }

  // Everything that is known: the active drafts, then the pool's entries.
  void load(const PooledStepParams& p) {
    const int64_t length = p_.length;
    drafts_ = std::clamp<int64_t>(p_.num_drafts.at(b_), 1, p_.input_drafts);  // draft 0 is right by construction
    const int64_t* states = contiguous_drafts(p_.drafts, b_, p_.input_drafts, length, scratch_.drafts_copy);
    const int64_t* tokens = contiguous_drafts(p_.token_ids, b_, p_.input_drafts, length, scratch_.token_ids_copy);
    const float* confidence = contiguous_drafts(p_.confidence, b_, p_.input_drafts, length, scratch_.confidence_copy);

    scratch_.states.resize(drafts_ * columns());
    scratch_.token_ids.resize(drafts_ * columns());
    scratch_.confidence.resize(drafts_ * columns());
    scratch_.expected.resize(std::max(length, columns()));
    scratch_.sure.resize(std::max(length, columns()));
    scratch_.known.clear();
    clock_ = 0;
    for (int64_t n = 0; n < entries_; ++n) clock_ = std::max(clock_, pool_.age[n]);
    for (int64_t j = 0; j < drafts_; ++j) {
      const int64_t computed =
          p.computed_length.data ? std::clamp<int64_t>(p.computed_length.at(b_, j), 0, length) : length;
      const int64_t* state = states + j * length;
      for (int64_t i = 0; i < length; ++i) {
        const int64_t token = i < computed ? tokens[j * length + i] : state[i];
        scratch_.expected[i] = token;
        scratch_.sure[i] = state[i] == mask() ? confidence_in(token, confidence[j * length + i], mask()) : -INFINITY;
      }
      to_columns(state, mask(), &scratch_.states[j * columns()]);
      to_columns(scratch_.expected.data(), mask(), &scratch_.token_ids[j * columns()]);
      to_columns(scratch_.sure.data(), -INFINITY, &scratch_.confidence[j * columns()]);
      scratch_.known.push_back({&scratch_.states[j * columns()], &scratch_.token_ids[j * columns()],
                                &scratch_.confidence[j * columns()], computed, clock_ + 1 + j, j});
    }
    for (int64_t n = 0; n < entries_; ++n) {
      if (pool_.age[n] <= 0) continue;
      const int64_t row = n * columns();
      scratch_.known.push_back({pool_.states + row, pool_.token_ids + row, pool_.confidence + row,
                                std::min(pool_.computed[n] - start_, length), pool_.age[n], n});
    }
  }

  bool is_draft(int64_t known) const { return known < drafts_; }

  bool is_masked(int64_t position) const { return scratch_.state[column(position)] == mask(); }

  // The state at work is `scratch_.state`. It only ever fills, so what was found out about its complete blocks stays.
  void begin_with(const int64_t* state) {
    scratch_.state.assign(state, state + columns());
    scratch_.distance.clear();
    for (const Known& known : scratch_.known) {
      int64_t distance = 0;
      for (int64_t c = 0; c < columns(); ++c) distance += known.state[c] != state[c];
      scratch_.distance.push_back(distance);
    }
    block_ = {0, 0};
    first_masked_ = 0;
    ended_ = false;
    advance();
  }

  void advance() {
    while (first_masked_ < p_.length && !is_masked(first_masked_)) ++first_masked_;
    const Span before = block_;
    block_ = first_masked_ < p_.length ? block_around(first_masked_, rule_.block_length, p_.length)
                                       : Span{p_.length, p_.length};
    for (int64_t i = before.begin; i < block_.begin; ++i)
      ended_ = ended_ || (i >= answer_start_ && rule_.ends(scratch_.state[column(i)]));
  }

  bool is_finished() const { return ended_ || block_.begin == p_.length; }

  void fill(int64_t position, int64_t token) {
    const int64_t c = column(position);
    for (size_t k = 0; k < scratch_.known.size(); ++k) {
      const int64_t there = scratch_.known[k].state[c];
      scratch_.distance[k] += (there != token) - (there != mask());
    }
    scratch_.state[c] = token;
  }

  bool serves(const Known& known) const { return block_.begin < block_.end && block_.end <= known.computed; }

  // Of the known states in `among`, the newest that is the state at work and whose static step is known; -1: none.
  template <typename Among>
  int64_t find(int64_t count, const Among& among) const {
    int64_t found = -1;
    for (int64_t n = 0; n < count; ++n) {
      const int64_t k = among(n);
      const Known& known = scratch_.known[k];
      if (found >= 0 && known.age < scratch_.known[found].age) continue;
      if (scratch_.distance[k] == 0 && serves(known)) found = k;
    }
    return found;
  }

  // Appends the positions that a static step from the state at work fills, in ascending order.
  template <typename Confidence>
  void pick(const Confidence& confidence) {
    const auto masked = [&](int64_t i) { return is_masked(i); };
    Keys& keys = scratch_.keys;
    keys.clear();
    const int64_t unrankable = collect(masked, confidence, block_, rule_.order, keys);
    int64_t count = 0;
    if (rule_.has_threshold)
      count = pass_threshold(masked, confidence, block_, rule_.order, rule_.threshold, rule_.rule, unrankable, keys);
    if (count == 0) {
      count = std::min<int64_t>(rule_.tokens_per_step, static_cast<int64_t>(keys.size()));
      sort_first(keys.begin(), keys.end(), count);
    }
    const size_t begin = scratch_.picks.size();
    for (int64_t n = 0; n < count; ++n) scratch_.picks.push_back(position_of(keys[n]));
    std::sort(scratch_.picks.begin() + begin, scratch_.picks.end());
  }

  void pick_by(const Known& known) {
    pick([&](int64_t i) { return known.confidence[column(i)]; });
  }

  void verify() {
    scratch_.path.clear();
    scratch_.picks.clear();
    begin_with(scratch_.known[0].state);
    int64_t at = 0;
    while (at >= 0) {
      const Known& known = scratch_.known[at];
      const auto begin = static_cast<int64_t>(scratch_.picks.size());
      if (serves(known)) pick_by(known);
      const auto end = static_cast<int64_t>(scratch_.picks.size());
      scratch_.path.push_back({at, begin, end});
      for (int64_t n = begin; n < end; ++n) fill(scratch_.picks[n], known.token_ids[column(scratch_.picks[n])]);
      advance();
      at = end > begin && !is_finished()
               ? find(static_cast<int64_t>(scratch_.known.size()), [](int64_t n) { return n; })
               : -1;
    }
  }

  // The newest known states that agree with the state at work wherever that is filled: decoding may come through them.
  void choose_kept() {
    std::vector<int64_t>& kept = scratch_.kept;
    kept.clear();
    const int64_t* state = scratch_.state.data();
    for (size_t k = 0; k < scratch_.known.size(); ++k) {
      const Known& known = scratch_.known[k];
      bool differs = false;  // no early return: so the compiler compares several at once
      for (int64_t c = 0; c < columns(); ++c) differs |= (state[c] != known.state[c]) & (state[c] != mask());
      if (!differs) kept.push_back(static_cast<int64_t>(k));
    }
    if (static_cast<int64_t>(kept.size()) <= entries_) return;
    const auto newer = [&](int64_t a, int64_t b) { return scratch_.known[a].age > scratch_.known[b].age; };
    std::nth_element(kept.begin(), kept.begin() + entries_, kept.end(), newer);
    kept.resize(entries_);
    std::sort(kept.begin(), kept.end());
  }

  void measure_effects() {
    scratch_.effects.clear();
    for (int64_t k = 1; k < drafts_; ++k) {
      const int64_t* before = scratch_.known[k - 1].state;
      const int64_t* after = scratch_.known[k].state;
      int64_t different = 0, last = 0;
      for (int64_t c = 0; c < columns(); ++c) {
        different += before[c] != after[c];
        last = before[c] != after[c] ? c : last;
      }
      if (different == 1 && before[last] == mask()) scratch_.effects.push_back({last, k});
    }
  }

  // What known state `by` has foreseen knows nothing of what is filled by now, but not there: where the effect on the
  // confidences was measured, half of it is added.
  void add_effects(int64_t by) {
    for (const Effect& effect : scratch_.effects) {
      if (scratch_.state[effect.column] == mask() || scratch_.known[by].state[effect.column] != mask()) continue;
      const float* before = scratch_.known[effect.draft - 1].confidence;
      const float* after = scratch_.known[effect.draft].confidence;
      for (int64_t i = block_.begin; i < block_.end; ++i) {
        const int64_t c = column(i);
        if (scratch_.foreseen_by[c] != by || !is_rankable(before[c]) || !is_rankable(after[c])) continue;
        scratch_.sure[c] += kEffect * (after[c] - before[c]);
      }
    }
  }

  // What to expect in the current block of the state at work: each position as predicted at the nearest known state
  // that has a prediction there, the oldest of those as near; its confidence with half the effects that were measured.
  void foresee() {
    int64_t open = 0;
    scratch_.foreseen_by.assign(columns(), -1);
    for (int64_t i = block_.begin; i < block_.end; ++i) {
      scratch_.sure[column(i)] = -INFINITY;
      open += is_masked(i);
    }
    int64_t last = -1;  // the known state that was looked at last
    for (size_t rounds = 0; rounds < scratch_.known.size() && open > 0; ++rounds) {
      int64_t nearest = -1;
      for (size_t n = 0; n < scratch_.known.size(); ++n) {
        const auto k = static_cast<int64_t>(n);
        if ((last < 0 || is_nearer(last, k)) && (nearest < 0 || is_nearer(k, nearest))) nearest = k;
      }
      const Known& known = scratch_.known[nearest];
      for (int64_t i = block_.begin; i < block_.end; ++i) {
        const int64_t c = column(i);
        if (!is_masked(i) || scratch_.foreseen_by[c] >= 0 || !is_rankable(known.confidence[c])) continue;
        scratch_.foreseen_by[c] = nearest;
        scratch_.sure[c] = known.confidence[c];
        scratch_.expected[c] = known.token_ids[c];
        --open;
      }
      add_effects(nearest);
      last = nearest;
    }
  }

  bool is_nearer(int64_t a, int64_t b) const {
    const int64_t distance = scratch_.distance[a], other = scratch_.distance[b];
    return distance != other ? distance < other : scratch_.known[a].age < scratch_.known[b].age;
  }

  // Goes on from the state at work as decoding is expected to: by what is known where the state is, else as foreseen.
  // States of the second kind are candidates for the next drafts.
  void walk() {
    scratch_.candidates.clear();
    scratch_.heap.clear();
    measure_effects();
    int64_t block = block_.begin;
    float score = 1.0f, values = 1.0f;
    while (!is_finished() && score > kLeastScore) {
      if (pipelined_ && block_.begin != block) score = score_of_values(values);
      block = block_.begin;
      const auto begin = static_cast<int64_t>(scratch_.picks.size());
      const int64_t at = find(static_cast<int64_t>(scratch_.kept.size()), [&](int64_t n) { return scratch_.kept[n]; });
      const int64_t* token_ids = scratch_.expected.data();
      if (at >= 0) {
        pick_by(scratch_.known[at]);
        token_ids = scratch_.known[at].token_ids;
      } else {
        if (!add_candidate(score, values)) break;
        score *= kScoreDecay;
        foresee();
        pick([&](int64_t i) { return scratch_.sure[column(i)]; });
        for (size_t n = begin; n < scratch_.picks.size(); ++n)
          values *= probability(scratch_.sure[column(scratch_.picks[n])]);
      }
      const auto end = static_cast<int64_t>(scratch_.picks.size());
      if (end == begin) break;
      for (int64_t n = begin; n < end; ++n) fill(scratch_.picks[n], token_ids[column(scratch_.picks[n])]);
      advance();
    }
  }

  // Makes the state at work a candidate, unless neither it nor any later one can be among the best.
  bool add_candidate(float score, float values) {
    std::vector<float>& best = scratch_.heap;  // scores of all but the first, which is certain; the least on top
    const auto wanted = static_cast<size_t>(p_.draft_steps);
    if (scratch_.candidates.size() >= wanted) {
      // Scores fall, but for a later block, whose score falls with the values. Ties go to the earlier.
      const float at_most = std::max(score, score_of_values(values));
      if (!pipelined_ || wanted == 1 || best.front() >= at_most) return false;
    }
    scratch_.candidates.push_back({score, static_cast<int64_t>(scratch_.picks.size())});
    if (!pipelined_ || wanted == 1 || scratch_.candidates.size() == 1) return true;
    best.push_back(score);
    std::push_heap(best.begin(), best.end(), std::greater<>());
    if (best.size() == wanted) {
      std::pop_heap(best.begin(), best.end(), std::greater<>());
      best.pop_back();
    }
    return true;
  }

  // The certain draft, which stands there already, and the best of the others, in the order of the walk.
  int64_t write_drafts(int64_t* drafts) {
    const std::vector<Candidate>& candidates = scratch_.candidates;
    std::vector<int64_t>& chosen = scratch_.chosen;
    chosen.clear();
    for (size_t n = 1; n < candidates.size(); ++n) chosen.push_back(static_cast<int64_t>(n));
    if (static_cast<int64_t>(chosen.size()) >= p_.draft_steps) {
      std::stable_sort(chosen.begin(), chosen.end(),
                       [&](int64_t a, int64_t b) { return candidates[a].score > candidates[b].score; });
      chosen.resize(p_.draft_steps - 1);
      std::sort(chosen.begin(), chosen.end());
    }
    int64_t* draft = drafts;
    int64_t filled = candidates.empty() ? 0 : candidates[0].picks;
    for (const int64_t n : chosen) {
      std::copy_n(draft, p_.length, draft + p_.length);
      draft += p_.length;
      for (; filled < candidates[n].picks; ++filled) {
        const int64_t i = scratch_.picks[filled];
        draft[i] = scratch_.state[column(i)];  // where the walk has ended, all of its picks are filled
      }
    }
    return 1 + static_cast<int64_t>(chosen.size());
  }

  void write_record(const Record& record, int64_t num_drafts) const {
    const Known& last = scratch_.known[scratch_.path.back().known];
    write_window(last.token_ids, record.token_ids);
    write_window(last.confidence, record.confidence);
    std::fill(record.confidence + p_.length, record.confidence + record.confidence_end, 0.0f);

    std::fill_n(record.step_map, p_.length, -1);
    int64_t steps = 0, accepted = 0;
    for (const Hop& hop : scratch_.path) {
      if (is_draft(hop.known)) accepted = hop.known;
      for (int64_t n = hop.begin; n < hop.end; ++n) record.step_map[scratch_.picks[n]] = step_ + steps;
      steps += hop.end > hop.begin;
    }
    const auto count = [&](Counter counter) -> int64_t& { return record.counters[static_cast<int>(counter)]; };
    count(Counter::kAccepted) = accepted;
    count(Counter::kSteps) = steps;
    count(Counter::kTokensCommitted) = scratch_.path.back().end;
    count(Counter::kPrefixLength) = block_of(scratch_.known[accepted].state).begin;
    const Span block = block_of(last.state);
    int64_t non_finite = block.begin;
    while (non_finite < block.end &&
           !(last.state[column(non_finite)] == mask() && !is_rankable(last.confidence[column(non_finite)])))
      ++non_finite;
    count(Counter::kNonFinite) = non_finite < block.end ? non_finite : -1;
    count_committed(p_, rule_, record.drafts, answer_start_, record.counters);
    count(Counter::kForwardDrafts) = count_forward_drafts(p_, record.drafts, num_drafts);
    count(Counter::kNumDrafts) = num_drafts;
  }

  Span block_of(const int64_t* state) const {
    return current_block([&](int64_t i) { return state[column(i)] == mask(); }, rule_.block_length, p_.length);
  }

  // Entries that are kept stay where they are; drafts go where there is room, the oldest first.
  void write_pool() {
    int64_t* age = pool_.age;
    std::vector<int64_t>& stays = scratch_.chosen;
    stays.assign(entries_, 0);
    for (const int64_t k : scratch_.kept) {
      if (!is_draft(k)) stays[scratch_.known[k].place] = 1;
    }
    for (int64_t n = 0; n < entries_; ++n) age[n] = stays[n] ? age[n] : 0;
    int64_t n = 0;
    for (const int64_t k : scratch_.kept) {
      if (!is_draft(k)) break;  // drafts come first
      while (stays[n]) ++n;
      const Known& draft = scratch_.known[k];
      const int64_t row = n * columns();
      std::copy_n(draft.state, columns(), pool_.states + row);
      std::copy_n(draft.token_ids, columns(), pool_.token_ids + row);
      std::copy_n(draft.confidence, columns(), pool_.confidence + row);
      pool_.computed[n] = start_ + draft.computed;
      age[n++] = draft.age;
    }
  }

  const DraftStepParams& p_;
  const StepRule rule_;
  const int64_t entries_, columns_;
  DraftPool pool_;
  const bool pipelined_;
  Scratch& scratch_;
  const int64_t b_;
  int64_t start_, origin_, answer_start_, step_, drafts_, clock_;
  Span block_;            // the current block of the state at work
  int64_t first_masked_;  // of the state at work
  bool ended_;            // a complete block of the state at work ends the sequence
};

}  // namespace

void launch(const PooledStepParams& p, ParallelFor run) {
  const DraftStepParams& step = p.step;
  const int64_t states = step.input_drafts + step.draft_steps + p.pool_entries;
  parallel_for(run, step.batch, grain_for(p.pool_columns * 8 * states), [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    for (int64_t b = begin; b < end; ++b) Sequence(p, b, scratch).run();
  });
}

}  // namespace freedave::cpu
