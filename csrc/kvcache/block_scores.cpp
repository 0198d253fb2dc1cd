// winnow::block_summaries, score_blocks and select_blocks on the CPU: which blocks a step attends.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/checks.h"
#include "common/tensors.h"
#include "kvcache/block_scores_simd.h"

namespace winnow {
namespace {

constexpr int64_t kGrainNumbers = 1 << 16;  // about 20 µs of reading for a thread

int64_t blocks_of(int64_t length, int64_t block_size) {
  return (length + block_size - 1) / block_size;
}

void check_lengths(const Tensor& seq_lens, int64_t batch, int64_t width, int64_t block_size,
                   const char* holder) {
  check_cpu("seq_lens", seq_lens);
  check_dtype("seq_lens", seq_lens, ScalarType::Int);
  WINNOW_CHECK(seq_lens.dim() == 1 && seq_lens.size(0) == batch,
               "seq_lens: expected (B,) with B=", batch, " as in ", holder, ", got ",
               shape_of(seq_lens));
  check_last_contiguous("seq_lens", seq_lens);
  const auto* lengths = static_cast<const int32_t*>(seq_lens.data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    WINNOW_CHECK(lengths[b] >= 0 && lengths[b] <= width * block_size,
                 "seq_lens: expected 0 <= length <= ", width * block_size, " (the blocks of ",
                 holder, "), got ", lengths[b], " in row ", b);
  }
}

Tensor block_summaries(const Tensor& key_pages, const Tensor& block_table, const Tensor& seq_lens,
                       bool minmax) {
  check_cpu("key_pages", key_pages);
  check_floating("key_pages", key_pages);
  check_dim("key_pages", key_pages, 4, "the pages of one layer, (num_blocks, Hkv, block_size, D)");
  check_last_contiguous("key_pages", key_pages);
  check_cpu("block_table", block_table);
  check_dtype("block_table", block_table, ScalarType::Int);
  check_dim("block_table", block_table, 2, "(B, max_blocks)");
  check_last_contiguous("block_table", block_table);
  const int64_t batch = block_table.size(0);
  const int64_t width = block_table.size(1);
  const int64_t num_blocks = key_pages.size(0);
  const int64_t heads = key_pages.size(1);
  const int64_t block_size = key_pages.size(2);
  const int64_t dim = key_pages.size(3);
  WINNOW_CHECK(block_size > 0, "key_pages: expected a block_size of at least 1, got ",
               shape_of(key_pages));
  check_lengths(seq_lens, batch, width, block_size, "block_table");
  const auto* table = static_cast<const int32_t*>(block_table.data_ptr());
  const auto* lengths = static_cast<const int32_t*>(seq_lens.data_ptr());
  const int64_t table_stride = block_table.stride(0);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < blocks_of(lengths[b], block_size); ++i) {
      const int32_t block = table[b * table_stride + i];
      WINNOW_CHECK(block >= 0 && block < num_blocks, "block_table: expected 0 <= block < ",
                   num_blocks, " in the blocks of row ", b, ", got ", block, " at ", i);
    }
  }

  Shape sizes{batch, heads, width, dim};
  if (minmax) sizes = {batch, heads, width, 2, dim};
  Tensor result = empty(sizes, statistics_dtype(key_pages), key_pages);
  const ElementType type = element_type(key_pages);
  const auto* keys = static_cast<const char*>(key_pages.data_ptr());
  const int64_t key_size = static_cast<int64_t>(key_pages.element_size());
  const int64_t block_stride = key_pages.stride(0);
  const int64_t head_stride = key_pages.stride(1);
  const int64_t slot_stride = key_pages.stride(2);
  auto* out = static_cast<char*>(result.data_ptr());
  const int64_t summary_bytes =
      (minmax ? 2 : 1) * dim * static_cast<int64_t>(result.element_size());
  const auto summarise = WINNOW_SIMD(block_summary);
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t i = n % width;
      const int64_t h = n / width % heads;
      const int64_t b = n / width / heads;
      const int64_t count = std::clamp<int64_t>(lengths[b] - i * block_size, 0, block_size);
      const int64_t block = count > 0 ? table[b * table_stride + i] : 0;
      summarise(keys + (block * block_stride + h * head_stride) * key_size, type, slot_stride,
                count, dim, minmax, out + n * summary_bytes);
    }
  };
  const int64_t grain = 1 + kGrainNumbers / (block_size * dim + 1);
  torch::stable::parallel_for(0, batch * heads * width, grain, work);
  return result;
}

Tensor score_blocks(const Tensor& query, const Tensor& summaries) {
  check_cpu("query", query);
  check_floating("query", query);
  check_dim("query", query, 4, "(B, Hq, T, D)");
  check_last_contiguous("query", query);
  check_cpu("summaries", summaries);
  check_dtype("summaries", summaries, statistics_dtype(query));
  const bool minmax = summaries.dim() == 5;
  const int64_t batch = query.size(0);
  const int64_t dim = query.size(3);
  WINNOW_CHECK((minmax ? summaries.size(3) == 2 && summaries.size(4) == dim
                       : summaries.dim() == 4 && summaries.size(3) == dim) &&
                   summaries.size(0) == batch,
               "summaries: expected (B, Hkv, NB, D) or (B, Hkv, NB, 2, D) with B=", batch,
               " and D=", dim, " as in query, got ", shape_of(summaries));
  check_last_contiguous("summaries", summaries);
  const int64_t heads = summaries.size(1);
  const int64_t blocks = summaries.size(2);
  WINNOW_CHECK(heads > 0 ? query.size(1) % heads == 0 : query.size(1) == 0,
               "query: expected a number of heads divisible by the key heads (", heads, "), got ",
               query.size(1));
  Tensor scores = empty({batch, heads, blocks}, summaries.scalar_type(), query);
  const int64_t group = heads > 0 ? query.size(1) / heads : 0;
  const int64_t queries = query.size(2);
  const ElementType type = element_type(query);
  const auto* q = static_cast<const char*>(query.data_ptr());
  const int64_t query_size = static_cast<int64_t>(query.element_size());
  const auto* from = static_cast<const char*>(summaries.data_ptr());
  auto* out = static_cast<char*>(scores.data_ptr());
  const int64_t size = static_cast<int64_t>(summaries.element_size());
  const int64_t bounds_stride = minmax ? summaries.stride(3) : 0;
  const int64_t q_batch = query.stride(0);
  const int64_t q_head = query.stride(1);
  const int64_t q_position = query.stride(2);
  const int64_t s_batch = summaries.stride(0);
  const int64_t s_head = summaries.stride(1);
  const int64_t s_block = summaries.stride(2);
  const auto score = WINNOW_SIMD(block_scores);
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end;) {
      const int64_t i = n % blocks;
      const int64_t h = n / blocks % heads;
      const int64_t b = n / blocks / heads;
      const int64_t count = std::min(blocks - i, end - n);
      score(q + (b * q_batch + h * group * q_head) * query_size, type, q_head, q_position, group,
            queries, dim, from + (b * s_batch + h * s_head + i * s_block) * size, s_block,
            bounds_stride, count, out + n * size);
      n += count;
    }
  };
  const int64_t grain = 1 + kGrainNumbers / (group * queries * dim + 1);
  torch::stable::parallel_for(0, batch * heads * blocks, grain, work);
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

Tensor select_blocks(const Tensor& scores, int64_t k, const Tensor& seq_lens, int64_t block_size,
                     int64_t sink_blocks, int64_t recent_blocks) {
  check_cpu("scores", scores);
  WINNOW_CHECK(
      scores.scalar_type() == ScalarType::Float || scores.scalar_type() == ScalarType::Double,
      "scores: expected float32 or float64, got ", name_of(scores.scalar_type()));
  check_dim("scores", scores, 3, "(B, Hkv, NB)");
  check_last_contiguous("scores", scores);
  WINNOW_CHECK(block_size >= 1, "block_size: expected at least 1, got ", block_size);
  WINNOW_CHECK(sink_blocks >= 0, "sink_blocks: expected at least 0, got ", sink_blocks);
  WINNOW_CHECK(recent_blocks >= 0, "recent_blocks: expected at least 0, got ", recent_blocks);
  WINNOW_CHECK(k >= 0 && k - sink_blocks >= recent_blocks, "k: expected at least sink_blocks + ",
               "recent_blocks = ", sink_blocks, " + ", recent_blocks, ", got ", k);
  const int64_t batch = scores.size(0);
  const int64_t heads = scores.size(1);
  check_lengths(seq_lens, batch, scores.size(2), block_size, "scores");
  Tensor result = empty({batch, heads, k}, ScalarType::Int, scores);
  const auto* lengths = static_cast<const int32_t*>(seq_lens.data_ptr());
  auto* selected = static_cast<int32_t*>(result.data_ptr());
  const int64_t batch_stride = scores.stride(0);
  const int64_t head_stride = scores.stride(1);
  const bool wide = scores.scalar_type() == ScalarType::Double;
  const void* from = scores.data_ptr();
  const auto work = [&](int64_t begin, int64_t end) {
    std::vector<Candidate> candidates;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t offset = n / heads * batch_stride + n % heads * head_stride;
      const int64_t blocks = blocks_of(lengths[n / heads], block_size);
      const auto select = [&](const auto* base) {
        select_row(base + offset, blocks, k, sink_blocks, recent_blocks, &candidates,
                   selected + n * k);
      };
      if (wide) {
        select(static_cast<const double*>(from));
      } else {
        select(static_cast<const float*>(from));
      }
    }
  };
  torch::stable::parallel_for(0, batch * heads, 1 + 4096 / (scores.size(2) + 1), work);
  return result;
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("block_summaries", TORCH_BOX(&winnow::block_summaries));
  m.impl("score_blocks", TORCH_BOX(&winnow::score_blocks));
  m.impl("select_blocks", TORCH_BOX(&winnow::select_blocks));
}
