#pragma once

#include <cstdint>

#include "common/cpu_capability.h"
#include "common/element_type.h"

namespace winnow {

// `rows` populations of `particles` log weights each, `stride` elements apart; the result is float,
// or double for double weights.
WINNOW_SIMD_DECLARE(effective_sample_size_rows, const void* log_weights, ElementType type,
                    int64_t stride, int64_t rows, int64_t particles, void* result)

}  // namespace winnow
