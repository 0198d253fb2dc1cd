#pragma once

#include "attention/problem.h"
#include "common/cpu_capability.h"

namespace winnow {

// Rows that a task takes: about a tile, of whole chunks where they are not larger than a few tiles.
// How the rows are divided decides how well vectors are filled, nothing else.
constexpr int64_t task_rows(const Pattern& pattern) {
  if (pattern.chunk_size > 4 * kTile) return kTile;
  const int64_t most = pattern.chunk_size < 16 ? kTile : kTile + 8;
  return pattern.chunk_size * larger(1, most / pattern.chunk_size);
}

constexpr int64_t row_tasks(const Pattern& pattern) {
  return (pattern.rows + task_rows(pattern) - 1) / task_rows(pattern);
}

constexpr int64_t forward_units(const AttentionProblem& problem) {
  return problem.batch * problem.query_heads * row_tasks(problem.pattern);
}

// Rows [row, end) of one head.
struct RowTask {
  int64_t batch, head;
  int64_t row, end;
};

// Early and late rows alternate: later ones see more, and threads get neighbouring units.
constexpr RowTask row_task(const AttentionProblem& problem, int64_t unit) {
  const int64_t tasks = row_tasks(problem.pattern);
  const int64_t head = unit / tasks;
  const int64_t place = unit % tasks;
  const int64_t size = task_rows(problem.pattern);
  const int64_t row = (place % 2 == 0 ? place / 2 : tasks - 1 - place / 2) * size;
  return {head / problem.query_heads, head % problem.query_heads, row,
          smaller(row + size, problem.pattern.rows)};
}

// Bytes of scratch memory per thread, whatever the number of rows.
constexpr int64_t forward_scratch_bytes(int64_t dim) {
  return 8 * (6 * kKeyTile * (padded_dim(dim) + 16) + 2 * kKeyTile * kTile) + 4096;
}

// out: contiguous (batch, query_heads, rows, dim) of the element type. lse: contiguous (batch,
// query_heads, rows) of float, or double for double elements.
WINNOW_SIMD_DECLARE(attention_forward, const AttentionProblem& problem, int64_t unit_begin,
                    int64_t unit_end, void* scratch, void* out, void* lse)

}  // namespace winnow
