// What the operators that store and move tokens in pages demand of their arguments, on either
// device.
#pragma once

#include "kvcache/page_arguments.h"

namespace winnow {

template <typename OnDevice>
void check_write(const Tensor& key_pages, const Tensor& value_pages, const Tensor& key,
                 const Tensor& value, const Tensor& block_table, const Tensor& positions,
                 const OnDevice& check_device) {
  const auto check_tokens = [&](const char* name, const Tensor& tokens, const char* pages_name,
                                const Tensor& pages) {
    check_pages(pages_name, pages, check_device);
    check_device(name, tokens);
    check_dim(name, tokens, 4, "(B, Hkv, T, D)");
    WINNOW_CHECK(tokens.size(1) == pages.size(1) && tokens.size(3) == pages.size(3), name,
                 ": expected (B, Hkv, T, D) with Hkv=", pages.size(1), " and D=", pages.size(3),
                 " as in ", pages_name, ", got ", shape_of(tokens));
    check_last_contiguous(name, tokens);
  };
  check_tokens("key", key, "key_pages", key_pages);
  check_tokens("value", value, "value_pages", value_pages);
  check_value_pages(value_pages, key_pages);
  for (int64_t d = 0; d < 3; ++d) {
    WINNOW_CHECK(value.size(d) == key.size(d), "value: expected shape like key up to the last ",
                 "dimension, ", shape_of(key), ", got ", shape_of(value));
  }
  check_table(block_table, key.size(0), "key", check_device);
  check_positions(positions, key.size(0), "key", check_device);
  WINNOW_CHECK(positions.size(1) == key.size(2), "positions: expected (B, T) with T=", key.size(2),
               " as in key, got ", shape_of(positions));
}

template <typename OnDevice>
void check_copies(const Tensor& key_pages, const Tensor& value_pages, const Tensor& source,
                  const Tensor& target, const OnDevice& check_device) {
  check_pool("key_pages", key_pages, check_device);
  check_pool("value_pages", value_pages, check_device);
  check_value_pages(value_pages, key_pages);
  const auto check_list = [&](const char* name, const Tensor& blocks) {
    check_device(name, blocks);
    check_dtype(name, blocks, ScalarType::Long);
    check_dim(name, blocks, 1, "(copies,)");
    check_last_contiguous(name, blocks);
  };
  check_list("source", source);
  check_list("target", target);
  WINNOW_CHECK(target.size(0) == source.size(0), "target: expected (copies,) = (", source.size(0),
               ",) as in source, got ", shape_of(target));
}

// Strides of `keep` by layer, row and head; 0 where one serves all.
struct KeepStrides {
  int64_t layer;
  int64_t row;
  int64_t head;
};

template <typename OnDevice>
KeepStrides check_compaction(const Tensor& pages, const Tensor& block_table, const Tensor& keep,
                             const OnDevice& check_device) {
  check_pool("pages", pages, check_device);
  const int64_t layers = pages.size(0);
  const int64_t heads = pages.size(2);
  WINNOW_CHECK(pages.size(3) > 0, "pages: expected a block_size of at least 1, got ",
               shape_of(pages));
  check_device("keep", keep);
  check_dtype("keep", keep, ScalarType::Long);
  WINNOW_CHECK(keep.dim() == 4 && (keep.size(0) == layers || keep.size(0) == 1) &&
                   (keep.size(2) == heads || keep.size(2) == 1),
               "keep: expected (num_layers or 1, B, Hkv or 1, K) with num_layers=", layers,
               " and Hkv=", heads, " as in pages, got ", shape_of(keep));
  check_last_contiguous("keep", keep);
  check_table(block_table, keep.size(1), "keep", check_device);
  return {keep.size(0) == 1 ? 0 : keep.stride(0), keep.stride(1),
          keep.size(2) == 1 ? 0 : keep.stride(2)};
}

// On the host, where what the indices hold can be read.
inline void check_places(const Tensor& block_table, const Tensor& positions, int64_t num_blocks,
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

}  // namespace winnow
