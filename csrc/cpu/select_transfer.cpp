// transfer[i] = whether position i is unmasked now, by the rule of some decoder: the first ranked, those above a
// threshold, or both. A thread owns a row.
#include "freedave/select_transfer.h"
#include "cpu/parallel.h"
#include "cpu/ranking.h"

namespace freedave::cpu {
namespace {

int64_t num_transfer_of(const SelectTransferParams& p, int64_t row) {
  return p.num_transfer_per_row.data ? p.num_transfer_per_row.at(row) : p.num_transfer;
}

void select_row(const SelectTransferParams& p, int64_t row, Keys& keys) {
  bool* transfer = p.transfer_index + row * p.length;
  std::fill(transfer, transfer + p.length, false);
  const auto is_masked = [&](int64_t i) { return p.mask_index.at(row, i); };
  const auto confidence = [&](int64_t i) { return p.confidence.at(row, i); };
  const Span block = current_block(is_masked, p.block_length, p.length);
  keys.clear();
  const int64_t unrankable = collect(is_masked, confidence, block, p.order, keys);
  const int64_t rankable = static_cast<int64_t>(keys.size());
  const int64_t wanted = std::clamp<int64_t>(num_transfer_of(p, row), 0, rankable);

  bool take_top = true;
  if (p.has_threshold) {
    const double threshold = p.threshold_of(row);
    const int64_t passing = pass_threshold(is_masked, confidence, block, p.order, threshold, p.rule, unrankable, keys);
    const int64_t enough = p.fallback == Fallback::kTop ? 1 : wanted;
    const bool take_passing = passing >= enough || p.fallback == Fallback::kTopAlways;
    for (int64_t n = 0; take_passing && n < passing; ++n) transfer[position_of(keys[n])] = true;
    take_top = !take_passing || p.fallback == Fallback::kTopAlways;
  }
  if (take_top) {
    sort_first(keys.begin(), keys.end(), wanted);
    for (int64_t n = 0; n < wanted; ++n) transfer[position_of(keys[n])] = true;
  }
}

}  // namespace

void launch(const SelectTransferParams& p, ParallelFor run) {
  parallel_for(run, p.confidence.rows.count, grain_for(p.length), [&](int64_t begin, int64_t end) {
    thread_local Keys keys;
    for (int64_t row = begin; row < end; ++row) select_row(p, row, keys);
  });
}

}  // namespace freedave::cpu
