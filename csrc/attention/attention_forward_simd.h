#pragma once

#include "attention/problem.h"
#include "common/cpu_capability.h"

namespace winnow {

// A unit is one tile of rows of one head: batch * query_heads * row_tiles(rows) units.
constexpr int64_t forward_units(const AttentionProblem& problem) {
  return problem.batch * problem.query_heads * row_tiles(problem.pattern.rows);
}

// Bytes of scratch memory per thread, whatever the number of rows.
constexpr int64_t forward_scratch_bytes(int64_t dim) {
  return 8 * (5 * kTile * padded_dim(dim) + 3 * kTile * 16 + 2 * kTile * kTile) + 4096;
}

// out: contiguous (batch, query_heads, rows, dim) of the element type. lse: contiguous (batch,
// query_heads, rows) of float, or double for double elements.
WINNOW_SIMD_DECLARE(attention_forward, const AttentionProblem& problem, int64_t unit_begin,
                    int64_t unit_end, void* scratch, void* out, void* lse)

}  // namespace winnow
