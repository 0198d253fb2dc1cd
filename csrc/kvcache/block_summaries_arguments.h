// What the operators that summarise blocks demand of their arguments, on either device.
#pragma once

#include <optional>

#include "kvcache/page_arguments.h"
#include "kvcache/quantised.h"

namespace winnow {

template <typename OnDevice>
void check_summarised(const Tensor& key_pages, const Tensor& block_table, const Tensor& seq_lens,
                      const std::optional<Tensor>& key_scales, const OnDevice& check_device) {
  const bool quantised = check_presence("key_scales", key_scales.has_value(), key_pages);
  if (!quantised) check_floating("key_pages", key_pages);
  check_key_pages(key_pages, check_device);
  if (quantised) {
    check_device("key_scales", *key_scales);
    check_scales("key_scales", *key_scales, key_pages);
  }
  check_integers("block_table", block_table, check_device);
  check_dim("block_table", block_table, 2, "(B, max_blocks)");
  check_lengths(seq_lens, block_table.size(0), "block_table", check_device);
}

// Of update_block_summaries_; returns whether the summaries are minima and maxima.
template <typename OnDevice>
bool check_kept(const Tensor& summaries, const Tensor& key_pages, const Tensor& block_table,
                const Tensor& positions, const OnDevice& check_device) {
  const int64_t dim = key_pages.size(3);
  check_device("summaries", summaries);
  check_dtype("summaries", summaries, statistics_dtype(key_pages));
  const bool minmax = summaries.dim() == 4;
  WINNOW_CHECK((minmax ? summaries.size(2) == 2 && summaries.size(3) == dim
                       : summaries.dim() == 3 && summaries.size(2) == dim) &&
                   summaries.size(0) == key_pages.size(0) && summaries.size(1) == key_pages.size(1),
               "summaries: expected (num_blocks, Hkv, D) or (num_blocks, Hkv, 2, D) with ",
               "num_blocks=", key_pages.size(0), ", Hkv=", key_pages.size(1), " and D=", dim,
               " as in key_pages, got ", shape_of(summaries));
  check_last_contiguous("summaries", summaries);
  WINNOW_CHECK(!minmax || summaries.stride(2) == dim || summaries.numel() == 0,
               "summaries: expected minimum and maximum side by side (stride ", dim,
               "), got stride ", summaries.stride(2));
  check_positions(positions, block_table.size(0), "block_table", check_device);
  return minmax;
}

}  // namespace winnow
