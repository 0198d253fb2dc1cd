// What paged_attention and attention_mass demand of their arguments, on either device.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>

#include "kvcache/page_arguments.h"
#include "kvcache/quantised.h"

namespace winnow {

// No position is as far away, and sums with it do not overflow.
constexpr int64_t kUnbounded = int64_t{1} << 40;

inline double score_scale(std::optional<double> scale, int64_t head_dim) {
  return scale ? *scale : 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(1, head_dim)));
}

// `query` and `key_pages` have passed check_query and check_key_pages.
template <typename OnDevice>
void check_query_and_keys(const Tensor& query, const Tensor& key_pages, const Tensor& block_table,
                          const Tensor& seq_lens, std::optional<int64_t> window, int64_t sinks,
                          const OnDevice& check_device) {
  const int64_t batch = query.size(0);
  WINNOW_CHECK(key_pages.size(3) == query.size(3),
               "key_pages: expected (num_blocks, Hkv, block_size, D) with D=", query.size(3),
               " as in query, got ", shape_of(key_pages));
  check_heads(query, key_pages.size(1));
  check_table(block_table, batch, "query", check_device);
  check_lengths(seq_lens, batch, "query", check_device);
  WINNOW_CHECK(!window || *window >= 1, "window: expected at least 1, got ", window.value_or(0));
  WINNOW_CHECK(sinks >= 0, "sinks: expected at least 0, got ", sinks);
}

// Pages in the dtype of the query, or codes with their scales; returns which.
template <typename OnDevice>
bool check_pages_and_scales(const Tensor& query, const Tensor& key_pages, const Tensor& value_pages,
                            const std::optional<Tensor>& key_scales,
                            const std::optional<Tensor>& value_scales,
                            const OnDevice& check_device) {
  const bool quantised =
      check_quantised(query, key_pages, key_scales.has_value(), value_scales.has_value());
  const ScalarType dtype = quantised ? key_pages.scalar_type() : query.scalar_type();
  check_dtype("key_pages", key_pages, dtype);
  check_dtype("value_pages", value_pages, dtype);
  check_key_pages(key_pages, check_device);
  check_pages("value_pages", value_pages, check_device);
  check_value_pages(value_pages, key_pages);
  if (quantised) {
    check_device("key_scales", *key_scales);
    check_device("value_scales", *value_scales);
    check_scales("key_scales", *key_scales, key_pages);
    check_scales("value_scales", *value_scales, value_pages);
  }
  return quantised;
}

// Returns whether the key heads share a list.
template <typename OnDevice>
bool check_block_indices(const Tensor& indices, int64_t batch, int64_t key_heads,
                         const OnDevice& check_device) {
  check_integers("block_indices", indices, check_device);
  const bool shared = indices.dim() == 2;
  WINNOW_CHECK(
      (shared || (indices.dim() == 3 && indices.size(1) == key_heads)) && indices.size(0) == batch,
      "block_indices: expected (B, K) or (B, Hkv, K) with B=", batch, " and Hkv=", key_heads,
      ", got ", shape_of(indices));
  return shared;
}

// A bias that broadcasts to the keys; its strides by block, head and slot.
template <typename OnDevice>
void check_key_bias(const Tensor& bias, const Tensor& key_pages, const Tensor& query,
                    const OnDevice& check_device, int64_t* stride) {
  check_device("key_bias", bias);
  check_floating("key_bias", bias);
  bool fits = bias.dim() <= 3;
  for (int64_t d = 0; d < 3 && fits; ++d) {
    const int64_t own = d - (3 - bias.dim());  // missing leading dimensions broadcast
    if (own < 0) continue;
    fits = bias.size(own) == 1 || bias.size(own) == key_pages.size(d);
    stride[d] = bias.size(own) == 1 ? 0 : bias.stride(own);
  }
  WINNOW_CHECK(fits, "key_bias: expected (num_blocks, Hkv, block_size) = (", key_pages.size(0),
               ", ", key_pages.size(1), ", ", key_pages.size(2), ") or broadcastable to it, got ",
               shape_of(bias));
  WINNOW_CHECK(
      bias.scalar_type() != ScalarType::Double || query.scalar_type() == ScalarType::Double,
      "key_bias: expected float32, bfloat16 or float16, got float64 with a query in ",
      name_of(query.scalar_type()));
}

// attention_mass, which has an lse and a bias for every key.
template <typename OnDevice>
void check_mass(const Tensor& query, const Tensor& key_pages, const Tensor& block_table,
                const Tensor& seq_lens, const Tensor& lse, std::optional<int64_t> window,
                int64_t sinks, const std::optional<Tensor>& key_bias,
                const OnDevice& check_device) {
  check_query(query, check_device);
  check_dtype("key_pages", key_pages, query.scalar_type());
  check_key_pages(key_pages, check_device);
  check_query_and_keys(query, key_pages, block_table, seq_lens, window, sinks, check_device);
  check_device("lse", lse);
  check_dtype("lse", lse, statistics_dtype(query));
  bool fits = lse.dim() == 3;
  for (int64_t d = 0; d < 3 && fits; ++d) fits = lse.size(d) == query.size(d);
  WINNOW_CHECK(fits, "lse: expected (B, Hq, T) = (", query.size(0), ", ", query.size(1), ", ",
               query.size(2), ") as in query, got ", shape_of(lse));
  if (!key_bias) return;
  check_device("key_bias", *key_bias);
  check_dtype("key_bias", *key_bias, statistics_dtype(query));
  check_dim("key_bias", *key_bias, 3, "(num_blocks, Hkv, block_size)");
  for (int64_t d = 0; d < 3; ++d) {
    WINNOW_CHECK(key_bias->size(d) == key_pages.size(d), "key_bias: expected (num_blocks, Hkv, ",
                 "block_size) as in key_pages, ", shape_of(key_pages), ", got ",
                 shape_of(*key_bias));
  }
}

}  // namespace winnow
