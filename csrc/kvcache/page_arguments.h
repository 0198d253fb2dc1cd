// What the operators over pages demand of their arguments, on either device: shapes, dtypes,
// places. `check_device(name, tensor)` refuses what lies elsewhere. What the indices hold is for
// block_table.h, where the host can read it.
#pragma once

#include "common/checks.h"
#include "common/tensors.h"

namespace winnow {

template <typename OnDevice>
void check_integers(const char* name, const Tensor& tensor, const OnDevice& check_device) {
  check_device(name, tensor);
  check_dtype(name, tensor, ScalarType::Int);
  check_last_contiguous(name, tensor);
}

// `holder` is the argument that the rows are those of.
template <typename OnDevice>
void check_table(const Tensor& block_table, int64_t batch, const char* holder,
                 const OnDevice& check_device) {
  check_integers("block_table", block_table, check_device);
  WINNOW_CHECK(block_table.dim() == 2 && block_table.size(0) == batch,
               "block_table: expected (B, max_blocks) with B=", batch, " as in ", holder, ", got ",
               shape_of(block_table));
}

template <typename OnDevice>
void check_lengths(const Tensor& seq_lens, int64_t batch, const char* holder,
                   const OnDevice& check_device) {
  check_integers("seq_lens", seq_lens, check_device);
  WINNOW_CHECK(seq_lens.dim() == 1 && seq_lens.size(0) == batch,
               "seq_lens: expected (B,) with B=", batch, " as in ", holder, ", got ",
               shape_of(seq_lens));
}

template <typename OnDevice>
void check_positions(const Tensor& positions, int64_t batch, const char* holder,
                     const OnDevice& check_device) {
  check_device("positions", positions);
  check_dtype("positions", positions, ScalarType::Long);
  WINNOW_CHECK(positions.dim() == 2 && positions.size(0) == batch,
               "positions: expected (B, T) with B=", batch, " as in ", holder, ", got ",
               shape_of(positions));
  check_last_contiguous("positions", positions);
}

template <typename OnDevice>
void check_pages(const char* name, const Tensor& pages, const OnDevice& check_device) {
  check_device(name, pages);
  check_dim(name, pages, 4, "the pages of one layer, (num_blocks, Hkv, block_size, D)");
  check_last_contiguous(name, pages);
}

template <typename OnDevice>
void check_key_pages(const Tensor& key_pages, const OnDevice& check_device) {
  check_pages("key_pages", key_pages, check_device);
  WINNOW_CHECK(key_pages.size(2) > 0, "key_pages: expected a block_size of at least 1, got ",
               shape_of(key_pages));
}

// All layers, as a pool holds them.
template <typename OnDevice>
void check_pool(const char* name, const Tensor& pages, const OnDevice& check_device) {
  check_device(name, pages);
  check_dim(name, pages, 5, "(num_layers, num_blocks, Hkv, block_size, D)");
  check_last_contiguous(name, pages);
}

inline void check_value_pages(const Tensor& value_pages, const Tensor& key_pages) {
  const bool pool = key_pages.dim() == 5;
  for (int64_t d = 0; d + 1 < key_pages.dim(); ++d) {
    WINNOW_CHECK(value_pages.size(d) == key_pages.size(d), "value_pages: expected (",
                 pool ? "num_layers, " : "", "num_blocks, Hkv, block_size, Dv) as in key_pages, ",
                 shape_of(key_pages), ", got ", shape_of(value_pages));
  }
}

template <typename OnDevice>
void check_query(const Tensor& query, const OnDevice& check_device) {
  check_device("query", query);
  check_floating("query", query);
  check_dim("query", query, 4, "(B, Hq, T, D)");
  check_last_contiguous("query", query);
}

inline void check_heads(const Tensor& query, int64_t key_heads) {
  const int64_t heads = query.size(1);
  WINNOW_CHECK(key_heads > 0 ? heads % key_heads == 0 : heads == 0,
               "query: expected a number of heads divisible by the key heads (", key_heads,
               "), got ", heads);
}

}  // namespace winnow
