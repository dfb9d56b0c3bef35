// One pass over the logits of the masked rows: the softmax of each chunk of the vocabulary.
//
// Work is a list of (masked row, chunk of the vocabulary); threads claim runs of it, read each chunk once with the
// widest SIMD kernel that the CPU has, and leave a partial softmax. Whoever merges those of a row does so in vocabulary
// order, so neither the threads nor the rest of the batch can change a bit. Each logit is read once from memory and
// needs about a dozen instructions a vector: the kernel is bound by memory bandwidth.
#include "cpu/scan_logits.h"

#include <algorithm>
#include <atomic>
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
  return nullptr;
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

}  // namespace

Scanned scan_logits(const LogitsToScan& p, int64_t chunk_size, ParallelFor run) {
  // Kept between calls: a decoder calls this with the same shapes thousands of times.
  thread_local std::vector<int64_t> masked, suppressed;
  thread_local std::vector<OnlineSoftmax> partials;
  list_masked(p, masked);
  list_suppressed(p, suppressed);
  const int64_t rows = static_cast<int64_t>(masked.size());
  const int64_t chunks = chunks_of(p.vocab, chunk_size);
  partials.resize(rows * chunks);

  const bool drawn = p.inverse_temperature > 0.0f;
  const ChunkKernel kernel = kernel_for(chosen_isa(), p.logit_type, p.measure, drawn);
  if (kernel == nullptr) throw std::logic_error("scan_logits: no kernel for these logits and this measure");
  const auto first = [&](int64_t item) { return item % chunks * chunk_size; };  // logit of the row
  const auto start = [&, positions = masked.data()](int64_t item) {
    return logits_of(p, positions[item / chunks]) + first(item) * element_size(p.logit_type);
  };
  const auto size_of = [&](int64_t item) { return std::min(chunk_size, p.vocab - first(item)); };
  // The prefetchers of other processors follow a stream from page to page. Fetching beside them makes an AMD EPYC a
  // sixth slower on float32 logits. It makes it a twentieth faster on 16-bit ones, which are bound by arithmetic.
  const bool fetch_ahead = is_intel() || p.logit_type != LogitType::kFloat32;
  const int64_t* suppressed_begin = suppressed.data();
  const int64_t* suppressed_end = suppressed_begin + suppressed.size();

  // 128 K logits take some 30 us to read, longer than a thread takes to wake.
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 17) / std::min(p.vocab, chunk_size));
  Queue queue(rows * chunks);
  parallel_for(run, queue.items, grain, [&, results = partials.data(), masked_rows = masked.data()](int64_t, int64_t) {
    for (Queue::Run now = queue.claim(), after; now.begin < queue.items; now = after) {
      after = queue.claim();  // before `now` is read, so that it can be fetched ahead
      for (int64_t item = now.begin; item < now.end; ++item) {
        Chunk chunk{.logits = start(item),
                    .size = size_of(item),
                    .first_token = p.first_token_id + first(item),
                    .fetch_ahead = fetch_ahead};
        chunk.suppressed = std::lower_bound(suppressed_begin, suppressed_end, chunk.first_token);
        chunk.num_suppressed =
            std::lower_bound(chunk.suppressed, suppressed_end, chunk.first_token + chunk.size) - chunk.suppressed;
        if (drawn) {
          const int64_t flat = masked_rows[item / chunks];
          chunk.inverse_temperature = p.inverse_temperature;
          chunk.floor = p.floor_at(flat / p.length, flat % p.length);
          chunk.key = {static_cast<uint64_t>(p.seed.at(flat / p.length, flat % p.length)),
                       static_cast<uint64_t>(p.position.at(flat / p.length, flat % p.length))};
        }
        if (const int64_t next = item + 1 < now.end ? item + 1 : after.begin; next < queue.items) {
          chunk.next = start(next);
          chunk.next_size = size_of(next);
        }
        results[item] = kernel(chunk);
      }
    }
  });

  return {masked, chunks, partials.data()};
}

}  // namespace freedave::cpu
