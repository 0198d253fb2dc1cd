#pragma once

#include <cstdint>

#include "common/cpu_capability.h"
#include "common/element_type.h"

namespace winnow {

// Rows of one part or result; strides in elements. lse is float, or double for double elements.
struct MergeRows {
  void* out = nullptr;
  void* lse = nullptr;
  int64_t out_stride = 0;
  int64_t lse_stride = 0;
};

struct MergeProblem {
  ElementType type = ElementType::kFloat;
  int64_t dim = 0;
  int64_t parts = 0;
  const MergeRows* part = nullptr;
  MergeRows merged;
  // For the gradient: of the merged result, and of every part.
  MergeRows grad;
  const MergeRows* part_grad = nullptr;
};

WINNOW_SIMD_DECLARE(merge_attention_rows, const MergeProblem& problem, int64_t row_begin,
                    int64_t row_end)
WINNOW_SIMD_DECLARE(merge_attention_backward_rows, const MergeProblem& problem, int64_t row_begin,
                    int64_t row_end)

}  // namespace winnow
