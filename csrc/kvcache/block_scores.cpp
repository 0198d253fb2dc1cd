// winnow::score_blocks, select_blocks and score_select_blocks on the CPU: which blocks a step
// attends.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "kvcache/block_scores_arguments.h"
#include "kvcache/block_scores_simd.h"
#include "kvcache/block_table.h"

namespace winnow {
namespace {

constexpr int64_t kGrainNumbers = 1 << 16;  // about 20 µs of reading for a thread

// The arguments that score a block, checked.
struct Scoring {
  const char* query;
  ElementType type;
  int64_t query_size;
  int64_t query_stride[3];  // batch, head, position
  int64_t group;
  int64_t queries;
  int64_t dim;
  const char* summaries;
  int64_t size;
  int64_t stride[3];      // batch, head, block; by place in the pages where there is a table
  int64_t bounds_stride;  // from the minimum to the maximum; 0 for means
  const int32_t* table;   // or null
  int64_t table_stride;
  int64_t batch;
  int64_t heads;
  int64_t blocks;
  ScalarType dtype;
  int64_t grain;  // blocks for a thread

  Scoring(const Tensor& q, const Tensor& s, const std::optional<Tensor>& block_table);

  // The blocks of a row lie scattered, so the machine's own prefetcher stops at each end.
  void fetch(int64_t block, int64_t h, int64_t bytes) const {
    if (block < 0) return;
    const char* from = summaries + (block * stride[2] + h * stride[1]) * size;
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + line);
  }

  // Blocks [first, first + count) of a row and key head.
  void score(int64_t b, int64_t h, int64_t first, int64_t count, char* out) const {
    const auto run = WINNOW_SIMD(block_scores);
    const char* q = query + (b * query_stride[0] + h * group * query_stride[1]) * query_size;
    const auto score_run = [&](const char* from, int64_t run_length, char* to) {
      run(q, type, query_stride[1], query_stride[2], group, queries, dim, from, stride[2],
          bounds_stride, run_length, to);
    };
    if (!table) {
      score_run(summaries + (b * stride[0] + h * stride[1] + first * stride[2]) * size, count, out);
      return;
    }
    const int64_t bytes = (bounds_stride > 0 ? 2 : 1) * dim * size;
    for (int64_t i = 0; i < count; ++i, out += size) {
      const int64_t block = table[b * table_stride + first + i];
      if (i + 1 < count) fetch(table[b * table_stride + first + i + 1], h, bytes);
      if (block < 0) {
        std::memset(out, 0, static_cast<size_t>(size));
      } else {
        score_run(summaries + (block * stride[2] + h * stride[1]) * size, 1, out);
      }
    }
  }
};

Scoring::Scoring(const Tensor& q, const Tensor& s, const std::optional<Tensor>& block_table) {
  check_scoring(q, s, block_table, check_cpu);
  batch = q.size(0);
  queries = q.size(2);
  dim = q.size(3);
  const int64_t leading = block_table ? 2 : 3;  // before the bounds, if any, and D
  const bool minmax = s.dim() == leading + 2;
  heads = s.size(1);
  group = heads > 0 ? q.size(1) / heads : 0;
  query = static_cast<const char*>(q.data_ptr());
  type = element_type(q);
  query_size = static_cast<int64_t>(q.element_size());
  summaries = static_cast<const char*>(s.data_ptr());
  size = static_cast<int64_t>(s.element_size());
  for (int64_t d = 0; d < 3; ++d) query_stride[d] = q.stride(d);
  bounds_stride = minmax ? s.stride(leading) : 0;
  stride[0] = block_table ? 0 : s.stride(0);
  stride[1] = s.stride(1);
  stride[2] = s.stride(block_table ? 0 : 2);
  table = nullptr;
  table_stride = 0;
  blocks = block_table ? block_table->size(1) : s.size(2);
  dtype = s.scalar_type();
  grain = 1 + kGrainNumbers / (group * queries * dim + 1);
  if (!block_table) return;
  static const int32_t kNoBlock = -1;  // an empty table has no memory, but it is a table
  table =
      block_table->numel() > 0 ? static_cast<const int32_t*>(block_table->data_ptr()) : &kNoBlock;
  table_stride = block_table->stride(0);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < blocks; ++i) {
      const int32_t block = table[b * table_stride + i];
      WINNOW_CHECK(block >= -1 && block < s.size(0), "block_table: expected -1 or 0 <= block < ",
                   s.size(0), " (the blocks of summaries), got ", block, " in row ", b);
    }
  }
}

Tensor score_blocks(const Tensor& query, const Tensor& summaries,
                    const std::optional<Tensor>& block_table) {
  const Scoring call(query, summaries, block_table);
  Tensor scores = empty({call.batch, call.heads, call.blocks}, call.dtype, query);
  auto* out = static_cast<char*>(scores.data_ptr());
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end;) {
      const int64_t i = n % call.blocks;
      const int64_t pair = n / call.blocks;
      const int64_t count = std::min(call.blocks - i, end - n);
      call.score(pair / call.heads, pair % call.heads, i, count, out + n * call.size);
      n += count;
    }
  };
  parallel_for(0, scores.numel(), call.grain, work);
  return scores;
}

struct Candidate {
  uint64_t rank;  // ascending with the score; 0 for NaN
  int32_t block;
};

uint64_t rank_of(double score) {
  if (score != score) return 0;
  score += 0.0;  // one zero
  uint64_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  return bits >> 63 ? ~bits : bits | (uint64_t{1} << 63);
}

// The best k blocks of a row in ascending order. `candidates` is scratch memory.
template <typename T>
void select_row(const T* scores, int64_t blocks, int64_t k, int64_t sinks, int64_t recents,
                std::vector<Candidate>* candidates, int32_t* selected) {
  if (blocks <= k) {
    for (int64_t i = 0; i < k; ++i) selected[i] = i < blocks ? static_cast<int32_t>(i) : -1;
    return;
  }
  candidates->clear();
  for (int64_t i = sinks; i < blocks - recents; ++i) {
    candidates->push_back({rank_of(static_cast<double>(scores[i])), static_cast<int32_t>(i)});
  }
  const int64_t wanted = k - sinks - recents;
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.rank != b.rank ? a.rank > b.rank : a.block < b.block;
  };
  std::nth_element(candidates->begin(), candidates->begin() + wanted, candidates->end(), better);
  int32_t* out = selected;
  for (int64_t i = 0; i < sinks; ++i) *out++ = static_cast<int32_t>(i);
  for (int64_t i = 0; i < wanted; ++i) *out++ = (*candidates)[static_cast<size_t>(i)].block;
  std::sort(selected + sinks, out);
  for (int64_t i = blocks - recents; i < blocks; ++i) *out++ = static_cast<int32_t>(i);
}

// Of scores (B, Hkv, NB) in the given strides.
Tensor select(const void* scores, bool wide, int64_t batch_stride, int64_t head_stride,
              int64_t batch, int64_t heads, int64_t width, const Tensor& seq_lens,
              const Competition& rule) {
  Tensor result = empty({batch, heads, rule.k}, ScalarType::Int, seq_lens);
  const auto* lengths = static_cast<const int32_t*>(seq_lens.data_ptr());
  auto* selected = static_cast<int32_t*>(result.data_ptr());
  const auto work = [&](int64_t begin, int64_t end) {
    std::vector<Candidate> candidates;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t offset = n / heads * batch_stride + n % heads * head_stride;
      const int64_t blocks = blocks_of(lengths[n / heads], rule.block_size);
      const auto select = [&](const auto* base) {
        select_row(base + offset, blocks, rule.k, rule.sinks, rule.recents, &candidates,
                   selected + n * rule.k);
      };
      if (wide) {
        select(static_cast<const double*>(scores));
      } else {
        select(static_cast<const float*>(scores));
      }
    }
  };
  parallel_for(0, batch * heads, 1 + 4096 / (width + 1), work);
  return result;
}

Tensor select_blocks(const Tensor& scores, int64_t k, const Tensor& seq_lens, int64_t block_size,
                     int64_t sink_blocks, int64_t recent_blocks) {
  check_scores(scores, check_cpu);
  const Competition rule = competition_of(k, block_size, sink_blocks, recent_blocks);
  check_lengths(seq_lens, scores.size(0), "scores", check_cpu);
  check_lengths_fit(seq_lens, scores.size(2), block_size, "scores");
  return select(scores.data_ptr(), scores.scalar_type() == ScalarType::Double, scores.stride(0),
                scores.stride(1), scores.size(0), scores.size(1), scores.size(2), seq_lens, rule);
}

// Scores only what competes: sinks, recent blocks and rows that keep everything are not read.
Tensor score_select_blocks(const Tensor& query, const Tensor& summaries, int64_t k,
                           const Tensor& seq_lens, int64_t block_size,
                           const std::optional<Tensor>& block_table, int64_t sink_blocks,
                           int64_t recent_blocks) {
  const Scoring call(query, summaries, block_table);
  const Competition rule = competition_of(k, block_size, sink_blocks, recent_blocks);
  const char* holder = block_table ? "block_table" : "summaries";
  check_lengths(seq_lens, call.batch, holder, check_cpu);
  check_lengths_fit(seq_lens, call.blocks, block_size, holder);
  const auto* lengths = static_cast<const int32_t*>(seq_lens.data_ptr());
  const int64_t items = call.batch * call.heads * call.blocks;
  const std::unique_ptr<char[]> scores(new char[static_cast<size_t>(items * call.size)]);
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end;) {
      const int64_t i = n % call.blocks;
      const int64_t pair = n / call.blocks;
      const int64_t count = std::min(call.blocks - i, end - n);
      const int64_t held = blocks_of(lengths[pair / call.heads], block_size);
      const int64_t first = std::max(i, rule.sinks);
      const int64_t last = held <= k ? 0 : std::min(i + count, held - rule.recents);
      if (first < last) {
        call.score(pair / call.heads, pair % call.heads, first, last - first,
                   scores.get() + (n + first - i) * call.size);
      }
      n += count;
    }
  };
  parallel_for(0, items, call.grain, work);
  return select(scores.get(), call.dtype == ScalarType::Double, call.heads * call.blocks,
                call.blocks, call.batch, call.heads, call.blocks, seq_lens, rule);
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("score_blocks", TORCH_BOX(&winnow::score_blocks));
  m.impl("select_blocks", TORCH_BOX(&winnow::select_blocks));
  m.impl("score_select_blocks", TORCH_BOX(&winnow::score_select_blocks));
}
