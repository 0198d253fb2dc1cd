// winnow::block_summaries and update_block_summaries_ on the CPU: the keys of a block in short, for
// all blocks of a table or for those that were written to.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "kvcache/block_scores_simd.h"
#include "kvcache/block_summaries_arguments.h"
#include "kvcache/block_table.h"

namespace winnow {
namespace {

constexpr int64_t kGrainNumbers = 1 << 16;  // about 20 µs of reading for a thread

// Where the keys of a block and head lie, and how they are read.
struct Keys {
  const char* pages;
  ElementType type;
  int64_t size;
  int64_t block_stride;
  int64_t head_stride;
  int64_t slot_stride;
  int64_t dim;
  int64_t grain;        // blocks for a thread
  const float* scales;  // of codes, or null
  int64_t scale_stride[2];
  CodeType codes;

  Keys(const Tensor& key_pages, const std::optional<Tensor>& key_scales)
      : pages(static_cast<const char*>(key_pages.data_ptr())),
        type(key_scales ? ElementType::kFloat : element_type(key_pages)),
        size(static_cast<int64_t>(key_pages.element_size())),
        block_stride(key_pages.stride(0)),
        head_stride(key_pages.stride(1)),
        slot_stride(key_pages.stride(2)),
        dim(key_pages.size(3)),
        grain(1 + kGrainNumbers / (key_pages.size(2) * dim + 1)),
        scales(nullptr) {
    if (!key_scales) return;
    scales = static_cast<const float*>(key_scales->data_ptr());
    for (int64_t d = 0; d < 2; ++d) scale_stride[d] = key_scales->stride(d);
    codes = code_type("key_pages", key_pages);
  }

  void summarise(int64_t block, int64_t head, int64_t count, bool minmax, void* summary) const {
    if (dim == 0) return;  // and perhaps no memory either
    const char* keys = pages + (block * block_stride + head * head_stride) * size;
    if (scales) {
      WINNOW_SIMD(code_block_summary)
      (keys, codes, scales[block * scale_stride[0] + head * scale_stride[1]], slot_stride, count,
       dim, minmax, static_cast<float*>(summary));
    } else {
      WINNOW_SIMD(block_summary)(keys, type, slot_stride, count, dim, minmax, summary);
    }
  }
};

Tensor block_summaries(const Tensor& key_pages, const Tensor& block_table, const Tensor& seq_lens,
                       bool minmax, const std::optional<Tensor>& key_scales) {
  check_summarised(key_pages, block_table, seq_lens, key_scales, check_cpu);
  const int64_t batch = block_table.size(0);
  const int64_t width = block_table.size(1);
  const int64_t heads = key_pages.size(1);
  const int64_t block_size = key_pages.size(2);
  const int64_t dim = key_pages.size(3);
  check_lengths_fit(seq_lens, width, block_size, "block_table");
  check_blocks(block_table, seq_lens, key_pages.size(0), block_size);

  Shape sizes{batch, heads, width, dim};
  if (minmax) sizes = {batch, heads, width, 2, dim};
  Tensor result = empty(sizes, statistics_dtype(key_pages), key_pages);
  const Keys keys(key_pages, key_scales);
  const auto* table = static_cast<const int32_t*>(block_table.data_ptr());
  const auto* lengths = static_cast<const int32_t*>(seq_lens.data_ptr());
  const int64_t table_stride = block_table.stride(0);
  auto* out = static_cast<char*>(result.data_ptr());
  const int64_t summary_bytes =
      (minmax ? 2 : 1) * dim * static_cast<int64_t>(result.element_size());
  parallel_for(0, batch * heads * width, keys.grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t i = n % width;
      const int64_t h = n / width % heads;
      const int64_t b = n / width / heads;
      const int64_t count = std::clamp<int64_t>(lengths[b] - i * block_size, 0, block_size);
      const int64_t block = count > 0 ? table[b * table_stride + i] : 0;
      keys.summarise(block, h, count, minmax, out + n * summary_bytes);
    }
  });
  return result;
}

void update_block_summaries_(Tensor summaries, const Tensor& key_pages, const Tensor& block_table,
                             const Tensor& seq_lens, const Tensor& positions,
                             const std::optional<Tensor>& key_scales) {
  check_summarised(key_pages, block_table, seq_lens, key_scales, check_cpu);
  const bool minmax = check_kept(summaries, key_pages, block_table, positions, check_cpu);
  const int64_t num_blocks = key_pages.size(0);
  const int64_t heads = key_pages.size(1);
  const int64_t block_size = key_pages.size(2);
  const int64_t batch = block_table.size(0);
  const int64_t width = block_table.size(1);
  check_lengths_fit(seq_lens, width, block_size, "block_table");

  const auto* table = static_cast<const int32_t*>(block_table.data_ptr());
  const auto* lengths = static_cast<const int32_t*>(seq_lens.data_ptr());
  const auto* where = static_cast<const int64_t*>(positions.data_ptr());
  struct Touched {
    int64_t block;
    int64_t count;  // of tokens in it
  };
  std::vector<Touched> touched;
  std::vector<int64_t> last_row(static_cast<size_t>(width), -1);  // that has touched a column
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t t = 0; t < positions.size(1); ++t) {
      const int64_t position = where[b * positions.stride(0) + t];
      if (position == -1) continue;
      WINNOW_CHECK(position >= 0 && position < lengths[b],
                   "positions: expected -1 or 0 <= position < ", lengths[b], " (the length of row ",
                   b, "), got ", position);
      const int64_t i = position / block_size;
      if (last_row[static_cast<size_t>(i)] == b) continue;
      last_row[static_cast<size_t>(i)] = b;
      const int32_t block = table[b * block_table.stride(0) + i];
      WINNOW_CHECK(block >= 0 && block < num_blocks, "block_table: expected 0 <= block < ",
                   num_blocks, " in the blocks of row ", b, ", got ", block, " at ", i);
      touched.push_back({block, std::min(block_size, lengths[b] - i * block_size)});
    }
  }
  const Keys keys(key_pages, key_scales);
  auto* out = static_cast<char*>(summaries.data_ptr());
  const int64_t size = static_cast<int64_t>(summaries.element_size());
  const int64_t block_stride = summaries.stride(0);
  const int64_t head_stride = summaries.stride(1);
  parallel_for(0, static_cast<int64_t>(touched.size()) * heads, keys.grain,
               [&](int64_t begin, int64_t end) {
                 for (int64_t n = begin; n < end; ++n) {
                   const Touched& now = touched[static_cast<size_t>(n / heads)];
                   const int64_t h = n % heads;
                   keys.summarise(now.block, h, now.count, minmax,
                                  out + (now.block * block_stride + h * head_stride) * size);
                 }
               });
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("block_summaries", TORCH_BOX(&winnow::block_summaries));
  m.impl("update_block_summaries_", TORCH_BOX(&winnow::update_block_summaries_));
}
