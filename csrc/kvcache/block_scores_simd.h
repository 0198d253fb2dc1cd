#pragma once

#include <cstdint>

#include "common/cpu_capability.h"
#include "common/element_type.h"
#include "kvcache/codes.h"

namespace winnow {

// The summary of `count` keys, `stride` elements apart: their minimum and maximum per dimension
// (2 * dim numbers) or their mean (dim). Zeros for no keys. Float, or double for double keys.
WINNOW_SIMD_DECLARE(block_summary, const void* keys, ElementType type, int64_t stride,
                    int64_t count, int64_t dim, bool minmax, void* summary)
// Of codes, whose numbers are `scale` times them.
WINNOW_SIMD_DECLARE(code_block_summary, const void* codes, CodeType type, float scale,
                    int64_t stride, int64_t count, int64_t dim, bool minmax, float* summary)

// What the query heads of one key head make of each block: the largest over `group` heads and
// `queries` positions. Summaries are `blocks` times (2 * dim or dim), contiguous within a block.
WINNOW_SIMD_DECLARE(block_scores, const void* query, ElementType type, int64_t head_stride,
                    int64_t position_stride, int64_t group, int64_t queries, int64_t dim,
                    const void* summaries, int64_t block_stride, int64_t bounds_stride,
                    int64_t blocks, void* scores)

}  // namespace winnow
