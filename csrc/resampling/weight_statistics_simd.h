#pragma once

#include <cstdint>

#include "common/cpu_capability.h"
#include "common/element_type.h"

namespace winnow {

enum class WeightStatistic : int { kLogMeanExp, kEntropy };

// `rows` populations of `particles` log weights each, `stride` elements apart; the result is float,
// or double for double weights.
WINNOW_SIMD_DECLARE(weight_statistic_rows, WeightStatistic statistic, const void* log_weights,
                    ElementType type, int64_t stride, int64_t rows, int64_t particles, void* result)

}  // namespace winnow
