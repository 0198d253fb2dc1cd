// How paged_attention and attention_mass describe a query and the keys that it meets to their loops
// on the CPU.
#pragma once

#include <algorithm>
#include <optional>

#include "common/tensors.h"
#include "kvcache/block_table.h"
#include "kvcache/paged_attention_arguments.h"
#include "kvcache/paged_attention_simd.h"

namespace winnow {

// What the host can read of the indices.
inline void check_rows(const Tensor& key_pages, const Tensor& block_table, const Tensor& seq_lens) {
  const int64_t block_size = key_pages.size(2);
  check_lengths_fit(seq_lens, block_table.size(1), block_size, "block_table");
  check_blocks(block_table, seq_lens, key_pages.size(0), block_size);
}

// A call without values, lists, biases and results.
inline PagedAttention describe_query_and_keys(const Tensor& query, const Tensor& key_pages,
                                              const Tensor& block_table, const Tensor& seq_lens,
                                              bool causal, std::optional<int64_t> window,
                                              int64_t sinks, std::optional<double> scale) {
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
  call.scale = score_scale(scale, call.head_dim);
  return call;
}

}  // namespace winnow
