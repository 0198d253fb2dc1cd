// What index tensors hold, checked where the host can read it: an index from outside of the pages
// would read foreign memory.
#pragma once

#include "kvcache/page_arguments.h"

namespace winnow {

inline int64_t blocks_of(int64_t length, int64_t block_size) {
  return (length + block_size - 1) / block_size;
}

// Of rows of `width` blocks, those of `holder`.
inline void check_lengths_fit(const Tensor& seq_lens, int64_t width, int64_t block_size,
                              const char* holder) {
  const auto* lengths = static_cast<const int32_t*>(seq_lens.data_ptr());
  for (int64_t b = 0; b < seq_lens.size(0); ++b) {
    WINNOW_CHECK(lengths[b] >= 0 && lengths[b] <= width * block_size,
                 "seq_lens: expected 0 <= length <= ", width * block_size, " (the blocks of ",
                 holder, "), got ", lengths[b], " in row ", b);
  }
}

// With lengths that fit: every block that a row uses lies in the pages.
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

}  // namespace winnow
