#pragma once

#include "attention/problem.h"
#include "common/cpu_capability.h"

namespace winnow {

// The gradient's work is divided over (batch, kv_head, split): a split owns a run of whole chunks,
// whose rows it goes through in order for every query head of the group. Splits depend on the shape
// alone, and slot gradients, which every later row contributes to, are kept per split and added up
// in the order of the splits: the result is the same for any number of threads.
struct BackwardProblem {
  AttentionProblem forward;
  int64_t splits = 1;
  const void* out = nullptr;       // contiguous (batch, query_heads, rows, dim)
  const void* lse = nullptr;       // contiguous (batch, query_heads, rows)
  const void* grad_lse = nullptr;  // contiguous
  Source grad_out;
  // Contiguous results. Interleaved patterns have no gradient of slots of their own.
  void* grad_query = nullptr;
  void* grad_key = nullptr;
  void* grad_value = nullptr;
  void* grad_slot_key = nullptr;
  void* grad_slot_value = nullptr;
  // Float (double): (batch, kv_heads, split, key or value, slots, padded_dim), not initialised.
  void* slot_sums = nullptr;
};

constexpr int64_t backward_units(const BackwardProblem& problem) {
  return problem.forward.batch * problem.forward.kv_heads * problem.splits;
}

// Rows that a split's window of local gradients holds at once. It moves along the rows, at most
// every other time by copying.
inline int64_t window_rows(const Pattern& pattern) {
  const int64_t reach = pattern.chunk_size * (pattern.lookback + (pattern.causal ? 1 : 2));
  const int64_t wanted = 2 * (reach + kTile);
  return wanted < pattern.rows ? wanted : pattern.rows;
}

inline int64_t backward_scratch_bytes(const AttentionProblem& problem) {
  const int64_t ld = padded_dim(problem.dim);
  return 8 * (12 * kKeyTile * (ld + 16) + 5 * kKeyTile * kTile +
              2 * window_rows(problem.pattern) * ld) +
         8192;
}

WINNOW_SIMD_DECLARE(attention_backward, const BackwardProblem& problem, int64_t unit_begin,
                    int64_t unit_end, void* scratch)

// Adds up the splits (slot_gradients_simd.cc): a unit is one (batch, kv_head).
WINNOW_SIMD_DECLARE(slot_gradients, const BackwardProblem& problem, int64_t unit_begin,
                    int64_t unit_end)

}  // namespace winnow
