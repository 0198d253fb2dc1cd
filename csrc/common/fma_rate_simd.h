// The machine's multiply-add ceiling, for benchmarks that report a share of it.
#pragma once

#include "common/cpu_capability.h"

namespace winnow {
WINNOW_SIMD_DECLARE(fma_operations, long long iterations, bool bf16, double* operations)
}  // namespace winnow
