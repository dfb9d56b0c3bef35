// rank[i] = number of masked positions that are committed before i: lower blocks first, then higher confidence, then
// the lower position. A thread owns a row; each block's keys are sorted on their own.
#include "freedave/rank_positions.h"
#include "cpu/parallel.h"
#include "cpu/ranking.h"

namespace freedave::cpu {
namespace {

void rank_row(const RankPositionsParams& p, int64_t row, Keys& keys) {
  int32_t* rank = p.rank + row * p.length;
  std::fill(rank, rank + p.length, static_cast<int32_t>(p.length));
  const auto is_masked = [&](int64_t i) { return p.mask_index.at(row, i); };
  const auto confidence = [&](int64_t i) { return p.confidence.at(row, i); };
  int32_t next = 0;
  for (int64_t begin = 0; begin < p.length;) {
    const Span block = block_around(begin, p.block_length, p.length);
    keys.clear();
    collect(is_masked, confidence, block, p.order, keys);
    std::sort(keys.begin(), keys.end());
    for (const uint64_t key : keys) rank[position_of(key)] = next++;
    begin = block.end;
  }
}

}  // namespace

void launch(const RankPositionsParams& p, ParallelFor run) {
  parallel_for(run, p.confidence.rows.count, grain_for(p.length), [&](int64_t begin, int64_t end) {
    thread_local Keys keys;
    for (int64_t row = begin; row < end; ++row) rank_row(p, row, keys);
  });
}

}  // namespace freedave::cpu
