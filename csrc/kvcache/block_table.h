// What the operators over a block table check before they follow it: an index from outside of the
// pages would read foreign memory.
#pragma once

#include "common/checks.h"

namespace winnow {

inline int64_t blocks_of(int64_t length, int64_t block_size) {
  return (length + block_size - 1) / block_size;
}

// (B,) lengths of rows of `width` blocks.
inline void check_lengths(const Tensor& seq_lens, int64_t batch, int64_t width, int64_t block_size,
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

inline void check_table(const Tensor& block_table) {
  check_cpu("block_table", block_table);
  check_dtype("block_table", block_table, ScalarType::Int);
  check_dim("block_table", block_table, 2, "(B, max_blocks)");
  check_last_contiguous("block_table", block_table);
}

// With both of the above: every block that a row uses lies in the pages.
inline void check_blocks(const Tensor& block_table, const Tensor& seq_lens, int64_t num_blocks,
                         int64_t block_size) {
  const auto* table = static_cast<const int32_t*>(block_table.data_ptr());
  const auto* lengths = static_cast<const int32_t*>(seq_lens.data_ptr());
  for (int64_t b = 0; b < seq_lens.size(0); ++b) {
    for (int64_t i = 0; i < blocks_of(lengths[b], block_size); ++i) {
      const int32_t block = table[b * block_table.stride(0) + i];
      WINNOW_CHECK(block >= 0 && block < num_blocks, "block_table: expected 0 <= block < ",
                   num_blocks, " in the blocks of row ", b, ", got ", block, " at ", i);
    }
  }
}

inline void check_key_layout(const Tensor& key_pages) {
  check_cpu("key_pages", key_pages);
  check_dim("key_pages", key_pages, 4, "the pages of one layer, (num_blocks, Hkv, block_size, D)");
  check_last_contiguous("key_pages", key_pages);
  WINNOW_CHECK(key_pages.size(2) > 0, "key_pages: expected a block_size of at least 1, got ",
               shape_of(key_pages));
}

inline void check_key_pages(const Tensor& key_pages) {
  check_floating("key_pages", key_pages);
  check_key_layout(key_pages);
}

}  // namespace winnow
