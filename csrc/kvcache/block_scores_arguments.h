// What the operators that choose blocks demand of their arguments, on either device.
#pragma once

#include <optional>

#include "kvcache/page_arguments.h"

namespace winnow {

// How many blocks are selected, and which do not compete for it.
struct Competition {
  int64_t k;
  int64_t block_size;
  int64_t sinks;
  int64_t recents;
};

inline Competition competition_of(int64_t k, int64_t block_size, int64_t sink_blocks,
                                  int64_t recent_blocks) {
  WINNOW_CHECK(block_size >= 1 && block_size < int64_t{1} << 31,
               "block_size: expected at least 1 and below 2**31, got ", block_size);
  WINNOW_CHECK(sink_blocks >= 0, "sink_blocks: expected at least 0, got ", sink_blocks);
  WINNOW_CHECK(recent_blocks >= 0, "recent_blocks: expected at least 0, got ", recent_blocks);
  WINNOW_CHECK(k <= INT32_MAX, "k: expected fewer than 2^31 blocks, got ", k);
  WINNOW_CHECK(k >= 0 && k - sink_blocks >= recent_blocks, "k: expected at least sink_blocks + ",
               "recent_blocks = ", sink_blocks, " + ", recent_blocks, ", got ", k);
  return {k, block_size, sink_blocks, recent_blocks};
}

template <typename OnDevice>
void check_scoring(const Tensor& query, const Tensor& summaries,
                   const std::optional<Tensor>& block_table, const OnDevice& check_device) {
  check_query(query, check_device);
  check_device("summaries", summaries);
  check_dtype("summaries", summaries, statistics_dtype(query));
  const int64_t batch = query.size(0);
  const int64_t dim = query.size(3);
  const int64_t leading = block_table ? 2 : 3;  // before the bounds, if any, and D
  const bool fits = summaries.dim() == leading + 2
                        ? summaries.size(leading) == 2 && summaries.size(leading + 1) == dim
                        : summaries.dim() == leading + 1 && summaries.size(leading) == dim;
  if (block_table) {
    WINNOW_CHECK(fits, "summaries: expected (num_blocks, Hkv, D) or (num_blocks, Hkv, 2, D) with ",
                 "D=", dim, " as in query, because there is a block_table, got ",
                 shape_of(summaries));
    check_table(*block_table, batch, "query", check_device);
  } else {
    WINNOW_CHECK(fits && summaries.size(0) == batch,
                 "summaries: expected (B, Hkv, NB, D) or (B, Hkv, NB, 2, D) with B=", batch,
                 " and D=", dim, " as in query, got ", shape_of(summaries));
  }
  check_last_contiguous("summaries", summaries);
  check_heads(query, summaries.size(1));
}

template <typename OnDevice>
void check_scores(const Tensor& scores, const OnDevice& check_device) {
  check_device("scores", scores);
  const ScalarType dtype = scores.scalar_type();
  WINNOW_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
               "scores: expected float32 or float64, got ", name_of(dtype));
  check_dim("scores", scores, 3, "(B, Hkv, NB)");
  check_last_contiguous("scores", scores);
}

}  // namespace winnow
