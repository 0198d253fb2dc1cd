// What paged_attention and attention_mass ask of a query and the keys that it meets on the CPU, and
// how both describe them to their loops.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>

#include "common/tensors.h"
#include "kvcache/block_table.h"
#include "kvcache/paged_attention_simd.h"

namespace winnow {

// `query` and `key_pages` have four dimensions and reach here with their dtypes checked.
inline void check_query_and_keys(const Tensor& query, const Tensor& key_pages,
                                 const Tensor& block_table, const Tensor& seq_lens,
                                 std::optional<int64_t> window, int64_t sinks) {
  const int64_t batch = query.size(0);
  const int64_t heads = query.size(1);
  const int64_t key_heads = key_pages.size(1);
  const int64_t block_size = key_pages.size(2);
  WINNOW_CHECK(key_pages.size(3) == query.size(3),
               "key_pages: expected (num_blocks, Hkv, block_size, D) with D=", query.size(3),
               " as in query, got ", shape_of(key_pages));
  WINNOW_CHECK(key_heads > 0 ? heads % key_heads == 0 : heads == 0,
               "query: expected a number of heads divisible by the key heads (", key_heads,
               "), got ", heads);
  check_table(block_table);
  WINNOW_CHECK(block_table.size(0) == batch, "block_table: expected (B, max_blocks) with B=", batch,
               " as in query, got ", shape_of(block_table));
  check_lengths(seq_lens, batch, block_table.size(1), block_size, "block_table");
  check_blocks(block_table, seq_lens, key_pages.size(0), block_size);
  WINNOW_CHECK(!window || *window >= 1, "window: expected at least 1, got ", window.value_or(0));
  WINNOW_CHECK(sinks >= 0, "sinks: expected at least 0, got ", sinks);
}

// A call without values, lists, biases and results.
inline PagedAttention describe_query_and_keys(const Tensor& query, const Tensor& key_pages,
                                              const Tensor& block_table, const Tensor& seq_lens,
                                              bool causal, std::optional<int64_t> window,
                                              int64_t sinks, std::optional<double> scale) {
  constexpr int64_t kUnbounded = int64_t{1} << 40;
  PagedAttention call{};
  call.type = element_type(query);
  call.query = query.data_ptr();
  call.key_pages = key_pages.data_ptr();
  for (int64_t d = 0; d < 3; ++d) {
    call.query_stride[d] = query.stride(d);
    call.key_stride[d] = key_pages.stride(d);
  }
  call.block_table = static_cast<const int32_t*>(block_table.data_ptr());
  call.table_stride = block_table.stride(0);
  call.seq_lens = static_cast<const int32_t*>(seq_lens.data_ptr());
  call.queries = query.size(2);
  call.key_heads = key_pages.size(1);
  call.group = call.key_heads > 0 ? query.size(1) / call.key_heads : 0;
  call.block_size = key_pages.size(2);
  call.head_dim = query.size(3);
  call.causal = causal;
  call.window = window ? std::min(*window, kUnbounded) : 0;
  call.sinks = std::min(sinks, kUnbounded);
  call.scale =
      scale ? *scale : 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(1, call.head_dim)));
  return call;
}

}  // namespace winnow
