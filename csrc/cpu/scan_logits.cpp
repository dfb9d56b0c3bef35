// One pass over the logits of the masked rows: the softmax of each chunk of the vocabulary.
//
// Work is a list of (masked row, chunk of the vocabulary); threads claim runs of it, read each chunk once with the
// widest SIMD kernel that the CPU has, and leave a partial softmax. Whoever merges those of a row does so in vocabulary
// order, so neither the threads nor the rest of the batch can change a bit. Each logit is read once from memory and
// needs about a dozen instructions a vector: the kernel is bound by memory bandwidth. Where a token is drawn, the
// chunks of a row that may hold it are looked at once more.
#include "cpu/scan_logits.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "cpu/isa.h"
#include "cpu/scan_logits_chunk.h"

namespace freedave::cpu {
namespace {

ChunkKernel kernel_for(Isa isa, LogitType logit_type, Measure measure, bool drawn) {
  switch (isa) {
#if FREEDAVE_X86
    case Isa::kAvx512:
      return chunk_kernel_avx512(logit_type, measure, drawn);
    case Isa::kAvx2:
      return chunk_kernel_avx2(logit_type, measure, drawn);
#else
    case Isa::kAvx512:
    case Isa::kAvx2:
#endif
    case Isa::kBaseline:
      return chunk_kernel_baseline(logit_type, measure, drawn);
  }
  return {};
}

int64_t element_size(LogitType type) { return type == LogitType::kFloat32 ? 4 : 2; }

bool is_masked(const LogitsToScan& p, int64_t row, int64_t position, int64_t token) {
  return p.mask_index.data ? p.mask_index.at(row, position) : token == p.mask_token_id;
}

// The logits of position `flat` of [*, L], shifted by one position where the model's convention asks for it.
const char* logits_of(const LogitsToScan& p, int64_t flat) {
  const bool shifted = p.logits_shift && flat % p.length > 0;
  return static_cast<const char*>(p.logits) + p.logit_rows.start(flat - shifted) * element_size(p.logit_type);
}

void list_masked(const LogitsToScan& p, std::vector<int64_t>& masked) {
  masked.clear();
  for (int64_t row = 0; row < p.input_ids.rows.count; ++row) {
    for (int64_t position = 0; position < p.length; ++position) {
      if (is_masked(p, row, position, p.input_ids.at(row, position))) masked.push_back(row * p.length + position);
    }
  }
}

// The suppressed ones among the logits, sorted, as the kernels look them up.
void list_suppressed(const LogitsToScan& p, std::vector<int64_t>& suppressed) {
  suppressed.clear();
  for (int64_t s = 0; s < p.num_suppress_tokens; ++s) {
    const int64_t token = p.suppress_tokens[s * p.suppress_tokens_step];
    if (token >= p.first_token_id && token - p.first_token_id < p.vocab) suppressed.push_back(token);
  }
  std::sort(suppressed.begin(), suppressed.end());
}

// Work that threads claim as they go. With fixed shares, one thread that another program keeps off its core makes all
// wait for it (a third longer, with one busy program on two cores).
class Queue {
 public:
  struct Run {
    int64_t begin, end;
  };

  // Runs of neighbours in memory, as long as that leaves enough of them to share; the last items one by one, so that
  // threads end together.
  explicit Queue(int64_t count)
      : items(count),
        run_(std::clamp<int64_t>(count / 32, 1, 4)),
        runs_((count - std::min<int64_t>(count / 8, 64)) / run_) {}

  // Begins at `items` or further when none is left.
  Run claim() {
    const int64_t claimed = claims_.fetch_add(1, std::memory_order_relaxed);
    const int64_t begin = std::min(claimed, runs_) * run_ + std::max<int64_t>(claimed - runs_, 0);
    return {begin, begin + (claimed < runs_ ? run_ : 1)};
  }

  const int64_t items;

 private:
  const int64_t run_;
  const int64_t runs_;
  std::atomic<int64_t> claims_{0};
};

// body(item, next) for all items, shared by threads; `next` is what the thread goes on with, -1 for nothing.
template <typename Body>
void share(ParallelFor run, int64_t items, int64_t grain, const Body& body) {
  Queue queue(items);
  parallel_for(run, items, grain, [&](int64_t, int64_t) {
    for (Queue::Run now = queue.claim(), after; now.begin < items; now = after) {
      after = queue.claim();  // before `now` is read, so that it can be fetched ahead
      for (int64_t item = now.begin; item < now.end; ++item) {
        const int64_t next = item + 1 < now.end ? item + 1 : after.begin;
        body(item, next < items ? next : -1);
      }
    }
  });
}

// What is known of the rows that tokens are drawn of, while threads look at their chunks.
class Draws {
 public:
  void begin(int64_t rows, int64_t chunks, int64_t chunk_size) {
    chunks_ = chunks;
    tiles_ = chunks_of(chunk_size, kTile);
    tops_.resize(rows * chunks * tiles_);
    if (static_cast<int64_t>(rows_.size()) < rows) rows_ = std::vector<Row>(rows);
    for (int64_t row = 0; row < rows; ++row) {
      rows_[row].bar.store(-INFINITY, std::memory_order_relaxed);
      rows_[row].left.store(chunks, std::memory_order_relaxed);
    }
  }

  // Room for the largest logit of each tile of a chunk.
  float* tops(int64_t item) { return tops_.data() + item * tiles_; }

  // A noisy logit of the row, the largest one known.
  float bar(int64_t item) const { return rows_[item / chunks_].bar.load(std::memory_order_relaxed); }
  void raise_bar(int64_t item, float noisy) {
    std::atomic<float>& bar = rows_[item / chunks_].bar;
    float known = bar.load(std::memory_order_relaxed);
    while (known < noisy && !bar.compare_exchange_weak(known, noisy, std::memory_order_relaxed)) {
    }
  }

  // Whether this was the last chunk of its row. What was found of the others can be read then.
  bool completes_row(int64_t item) { return rows_[item / chunks_].left.fetch_sub(1, std::memory_order_acq_rel) == 1; }

 private:
  struct Row {
    std::atomic<float> bar;
    std::atomic<int64_t> left;
  };
  int64_t chunks_ = 0, tiles_ = 0;
  std::vector<float> tops_;
  std::vector<Row> rows_;
};

// One call.
class Scan {
 public:
  Scan(const LogitsToScan& p, int64_t chunk_size, DrawnFrom scope, const std::vector<int64_t>& masked,
       const std::vector<int64_t>& suppressed, OnlineSoftmax* results, Draws& draws)
      : p_(p),
        chunk_size_(chunk_size),
        chunks_(chunks_of(p.vocab, chunk_size)),
        rows_(static_cast<int64_t>(masked.size())),
        // 128 K logits take some 30 us to read, longer than a thread takes to wake.
        grain_(std::max<int64_t>(1, (int64_t{1} << 17) / std::min(p.vocab, chunk_size))),
        drawn_(p.drawn()),
        scope_(scope),
        kernel_(kernel_for(chosen_isa(), p.logit_type, p.measure, drawn_)),
        // The prefetchers of other processors follow a stream from page to page. Fetching beside them makes an AMD EPYC
        // a sixth slower on float32 logits. It makes it a twentieth faster on 16-bit ones, which are bound by
        // arithmetic.
        fetch_ahead_(is_intel() || p.logit_type != LogitType::kFloat32),
        masked_(masked.data()),
        suppressed_(suppressed.data()),
        suppressed_end_(suppressed_ + suppressed.size()),
        results_(results),
        draws_(draws) {
    if (kernel_.scan == nullptr) throw std::logic_error("scan_logits: no kernel for these logits and this measure");
    if (drawn_) draws_.begin(rows_, chunks_, chunk_size);
  }

  // A token is drawn after all chunks of its row were scanned, which leaves few of them to look at. As soon as they
  // were, by the thread that scanned the last one, they are in a cache; but a few rows are better shared by chunks.
  void run(ParallelFor run) {
    const bool by_rows = rows_ >= kManyRows;
    share(run, rows_ * chunks_, grain_, [&](int64_t item, int64_t next) {
      scan(item, next);
      if (!drawn_ || scope_ == DrawnFrom::kChunk) return;
      draws_.raise_bar(item, choice_of(results_[item]).noisy);
      if (!by_rows || !draws_.completes_row(item)) return;
      const int64_t first = item / chunks_ * chunks_;
      for (int64_t each = first; each < first + chunks_; ++each) draw(each);
    });
    if (!drawn_ || scope_ == DrawnFrom::kChunk || by_rows) return;
    thread_local std::vector<int64_t> undecided;
    undecided.clear();
    for (int64_t item = 0; item < rows_ * chunks_; ++item) {
      if (might(item)) undecided.push_back(item);
    }
    share(run, static_cast<int64_t>(undecided.size()), grain_,
          [&, items = undecided.data()](int64_t i, int64_t) { draw(items[i]); });
  }

 private:
  // As many rows keep the threads busy when each is one thread's.
  static constexpr int64_t kManyRows = 32;

  int64_t first(int64_t item) const { return item % chunks_ * chunk_size_; }  // logit of the row
  int64_t size_of(int64_t item) const { return std::min(chunk_size_, p_.vocab - first(item)); }
  const char* start(int64_t item) const {
    return logits_of(p_, masked_[item / chunks_]) + first(item) * element_size(p_.logit_type);
  }

  Chunk chunk_of(int64_t item) const {
    Chunk chunk{.logits = start(item),
                .size = size_of(item),
                .first_token = p_.first_token_id + first(item),
                .fetch_ahead = fetch_ahead_};
    chunk.suppressed = std::lower_bound(suppressed_, suppressed_end_, chunk.first_token);
    chunk.num_suppressed =
        std::lower_bound(chunk.suppressed, suppressed_end_, chunk.first_token + chunk.size) - chunk.suppressed;
    if (drawn_) {
      const int64_t row = masked_[item / chunks_] / p_.length, place = masked_[item / chunks_] % p_.length;
      chunk.draws = p_.draws_at(row, place);
      chunk.scale = p_.scale_at(row, place);
      chunk.floor = p_.floor_at(row, place);
      chunk.key = {static_cast<uint64_t>(p_.seed.at(row, place)), static_cast<uint64_t>(p_.position.at(row, place))};
      chunk.tops = draws_.tops(item);
    }
    return chunk;
  }

  void scan(int64_t item, int64_t next) {
    Chunk chunk = chunk_of(item);
    if (next >= 0) {
      chunk.next = start(next);
      chunk.next_size = size_of(next);
    }
    results_[item] = kernel_.scan(chunk);
    if (drawn_ && scope_ == DrawnFrom::kChunk) draw(item);
  }

  // Whether a token of the chunk may do better than the best one known. Noise is bounded.
  bool might(int64_t item) const {
    const int64_t row = masked_[item / chunks_] / p_.length, place = masked_[item / chunks_] % p_.length;
    return p_.draws_at(row, place) && results_[item].token >= 0 &&
           results_[item].max + kLargestNoise >= draws_.bar(item);
  }

  void draw(int64_t item) {
    if (!might(item)) return;
    const NoisyChoice best = kernel_.draw(chunk_of(item), choice_of(results_[item]), draws_.bar(item));
    set_choice(results_[item], best);
    if (scope_ == DrawnFrom::kRow) draws_.raise_bar(item, best.noisy);
  }

  const LogitsToScan& p_;
  const int64_t chunk_size_, chunks_, rows_, grain_;
  const bool drawn_;
  const DrawnFrom scope_;
  const ChunkKernel kernel_;
  const bool fetch_ahead_;
  const int64_t* const masked_;
  const int64_t* const suppressed_;
  const int64_t* const suppressed_end_;
  OnlineSoftmax* const results_;
  Draws& draws_;
};

}  // namespace

Scanned scan_logits(const LogitsToScan& p, int64_t chunk_size, DrawnFrom scope, ParallelFor run) {
  // Kept between calls: a decoder calls this with the same shapes thousands of times.
  thread_local std::vector<int64_t> masked, suppressed;
  thread_local std::vector<OnlineSoftmax> partials;
  thread_local Draws draws;
  list_masked(p, masked);
  list_suppressed(p, suppressed);
  const int64_t chunks = chunks_of(p.vocab, chunk_size);
  partials.resize(static_cast<int64_t>(masked.size()) * chunks);
  Scan(p, chunk_size, scope, masked, suppressed, partials.data(), draws).run(run);
  return {masked, chunks, partials.data()};
}

}  // namespace freedave::cpu
