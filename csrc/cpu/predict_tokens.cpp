// token[i] = arg max_v x[i, v] and its confidence, e.g. 1 / sum_v exp(x[i, v] - max), for the masked rows i.
//
// Work is a list of (masked row, chunk of the vocabulary); threads claim runs of it, read each chunk once with the
// widest SIMD kernel that the CPU has, and leave a partial softmax. The partials of a row are merged in vocabulary
// order, so neither the threads nor the rest of the batch can change a bit. Each logit is read once from memory and
// needs about a dozen instructions a vector: the kernel is bound by memory bandwidth.
#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/isa.h"
#include "cpu/launch.h"
#include "cpu/predict_tokens_chunk.h"

namespace freedave::cpu {
namespace {

const ChunkKernels& kernels_for(Isa isa) {
#if FREEDAVE_X86
  if (isa == Isa::kAvx512) return chunk_kernels_avx512();
  if (isa == Isa::kAvx2) return chunk_kernels_avx2();
#else
  (void)isa;
#endif
  return chunk_kernels_baseline();
}

int64_t element_size(LogitType type) { return type == LogitType::kFloat32 ? 4 : 2; }

bool is_masked(const PredictTokensParams& p, int64_t row, int64_t position, int64_t token) {
  return p.mask_index.data ? p.mask_index.at(row, position) : token == p.mask_token_id;
}

// The logits of position `flat` of [*, L], shifted by one position where the model's convention asks for it.
const char* logits_of(const PredictTokensParams& p, int64_t flat) {
  const bool shifted = p.logits_shift && flat % p.length > 0;
  return static_cast<const char*>(p.logits) + p.logit_rows.start(flat - shifted) * element_size(p.logit_type);
}

// Passes every position that is not masked through, and lists the others.
void list_masked(const PredictTokensParams& p, std::vector<int64_t>& masked) {
  masked.clear();
  for (int64_t row = 0; row < p.input_ids.rows.count; ++row) {
    for (int64_t position = 0; position < p.length; ++position) {
      const int64_t flat = row * p.length + position;
      const int64_t token = p.input_ids.at(row, position);
      p.token_ids[flat] = token;
      p.confidence[flat] = -INFINITY;
      if (is_masked(p, row, position, token)) masked.push_back(flat);
    }
  }
}

// The ids that the kernels look up by chunk: sorted, within the vocabulary.
void list_suppressed(const PredictTokensParams& p, std::vector<int64_t>& suppressed) {
  suppressed.clear();
  for (int64_t s = 0; s < p.num_suppress_tokens; ++s) {
    const int64_t token = p.suppress_tokens[s * p.suppress_tokens_step];
    if (token >= 0 && token < p.vocab) suppressed.push_back(token);
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

void predict_tokens(const PredictTokensParams& p, ParallelFor run) {
  // Kept between calls: a decoder calls this with the same shapes thousands of times.
  thread_local std::vector<int64_t> masked, suppressed;
  thread_local std::vector<OnlineSoftmax> partials;
  list_masked(p, masked);
  list_suppressed(p, suppressed);
  const int64_t rows = static_cast<int64_t>(masked.size());
  const int64_t chunks = (p.vocab + kChunk - 1) / kChunk;
  partials.resize(rows * chunks);

  const ChunkKernel kernel =
      kernels_for(chosen_isa()).kernel[static_cast<int>(p.logit_type)][static_cast<int>(p.measure)];
  const auto first_token = [&](int64_t item) { return item % chunks * kChunk; };
  const auto start = [&, positions = masked.data()](int64_t item) {
    return logits_of(p, positions[item / chunks]) + first_token(item) * element_size(p.logit_type);
  };
  const auto size_of = [&](int64_t item) { return std::min(kChunk, p.vocab - first_token(item)); };
  const int64_t* suppressed_begin = suppressed.data();
  const int64_t* suppressed_end = suppressed_begin + suppressed.size();

  // 128 K logits take some 30 us to read, longer than a thread takes to wake.
  const int64_t grain = std::max<int64_t>(1, (int64_t{1} << 17) / std::min(p.vocab, kChunk));
  Queue queue(rows * chunks);
  parallel_for(run, queue.items, grain, [&, results = partials.data()](int64_t, int64_t) {
    for (Queue::Run now = queue.claim(), after; now.begin < queue.items; now = after) {
      after = queue.claim();  // already, so that it can be fetched ahead
      for (int64_t item = now.begin; item < now.end; ++item) {
        Chunk chunk{.logits = start(item), .size = size_of(item), .first_token = first_token(item)};
        chunk.suppressed = std::lower_bound(suppressed_begin, suppressed_end, chunk.first_token);
        chunk.num_suppressed =
            std::lower_bound(chunk.suppressed, suppressed_end, chunk.first_token + chunk.size) - chunk.suppressed;
        if (const int64_t next = item + 1 < now.end ? item + 1 : after.begin; next < queue.items) {
          chunk.next = start(next);
          chunk.next_size = size_of(next);
        }
        results[item] = kernel(chunk);
      }
    }
  });

  for (int64_t row = 0; row < rows; ++row) {
    OnlineSoftmax whole = partials[row * chunks];
    for (int64_t chunk = 1; chunk < chunks; ++chunk) whole = merge(whole, partials[row * chunks + chunk]);
    if (is_broken(whole)) continue;
    p.token_ids[masked[row]] = whole.token;
    p.confidence[masked[row]] = confidence_of(whole, p.measure);
  }
}

}  // namespace freedave::cpu
