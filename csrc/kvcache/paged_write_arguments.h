// What the operators that store tokens in pages demand of their arguments, on either device.
#pragma once

#include "common/checks.h"

namespace winnow {
namespace {

// `check_place(name, tensor)` refuses what lies on another device.
template <typename CheckPlace>
void check_write(const Tensor& key_pages, const Tensor& value_pages, const Tensor& key,
                 const Tensor& value, const Tensor& block_table, const Tensor& positions,
                 const CheckPlace& check_place) {
  const auto check_tokens = [&](const char* name, const Tensor& tokens, const char* pages_name,
                                const Tensor& pages) {
    check_place(name, tokens);
    check_place(pages_name, pages);
    check_dim(pages_name, pages, 4, "(num_blocks, Hkv, block_size, D)");
    check_dim(name, tokens, 4, "(B, Hkv, T, D)");
    WINNOW_CHECK(tokens.size(1) == pages.size(1) && tokens.size(3) == pages.size(3), name,
                 ": expected (B, Hkv, T, D) with Hkv=", pages.size(1), " and D=", pages.size(3),
                 " as in ", pages_name, ", got ", shape_of(tokens));
    check_last_contiguous(name, tokens);
    check_last_contiguous(pages_name, pages);
  };
  check_tokens("key", key, "key_pages", key_pages);
  check_tokens("value", value, "value_pages", value_pages);
  for (int64_t d = 0; d < 3; ++d) {
    WINNOW_CHECK(value_pages.size(d) == key_pages.size(d), "value_pages: expected shape like ",
                 "key_pages up to the last dimension, ", shape_of(key_pages), ", got ",
                 shape_of(value_pages));
    WINNOW_CHECK(value.size(d) == key.size(d), "value: expected shape like key up to the last ",
                 "dimension, ", shape_of(key), ", got ", shape_of(value));
  }
  const int64_t rows = key.size(0);
  const int64_t tokens = key.size(2);
  check_place("block_table", block_table);
  check_dtype("block_table", block_table, ScalarType::Int);
  WINNOW_CHECK(block_table.dim() == 2 && block_table.size(0) == rows,
               "block_table: expected (B, max_blocks) with B=", rows, " as in key, got ",
               shape_of(block_table));
  check_last_contiguous("block_table", block_table);
  check_place("positions", positions);
  check_dtype("positions", positions, ScalarType::Long);
  WINNOW_CHECK(positions.dim() == 2 && positions.size(0) == rows && positions.size(1) == tokens,
               "positions: expected (B, T) = (", rows, ", ", tokens, ") as in key, got ",
               shape_of(positions));
  check_last_contiguous("positions", positions);
}

// On the host, where what the indices hold can be read.
inline void check_positions(const Tensor& block_table, const Tensor& positions, int64_t num_blocks,
                            int64_t block_size) {
  const auto* table = static_cast<const int32_t*>(block_table.data_ptr());
  const auto* where = static_cast<const int64_t*>(positions.data_ptr());
  const int64_t width = block_table.size(1);
  for (int64_t b = 0; b < positions.size(0); ++b) {
    for (int64_t t = 0; t < positions.size(1); ++t) {
      const int64_t position = where[b * positions.stride(0) + t];
      if (position == -1) continue;
      WINNOW_CHECK(position >= 0 && position < width * block_size,
                   "positions: expected -1 or 0 <= position < ", width * block_size,
                   " (the blocks of block_table), got ", position, " in row ", b);
      const int32_t block = table[b * block_table.stride(0) + position / block_size];
      WINNOW_CHECK(block >= 0 && block < num_blocks, "block_table: expected 0 <= block < ",
                   num_blocks, " at position ", position, " of row ", b, ", got ", block);
    }
  }
}

}  // namespace
}  // namespace winnow
