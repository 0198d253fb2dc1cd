#pragma once

#include "common/cpu_capability.h"
#include "unmasking/logit_rows.h"

namespace winnow {

// Sums of `units` consecutive slices: unit u is slice u % logit_slices(vocab) of row
// active[u / logit_slices(vocab)].
WINNOW_SIMD_DECLARE(scan_logit_slices, const LogitRows& rows, const int64_t* active, int64_t unit,
                    int64_t units, double temperature, double draw_temperature,
                    LogitSliceSums* sums)

// A token of one slice drawn in proportion to exp(x / temperature), by inverting the distribution
// function at `uniform` in [0, 1); only what `kept` keeps.
WINNOW_SIMD_DECLARE(draw_in_logit_slice, const LogitRows& rows, int64_t row, int64_t slice,
                    float reference, double temperature, double uniform, const Truncation& kept,
                    int64_t* token)

// One logit as the loops load it.
WINNOW_SIMD_DECLARE(logit_at, const LogitRows& rows, int64_t row, int64_t index, float* logit)

// For the rare row whose largest logit is infinite: the index of the first such, -1 where a NaN is
// about.
WINNOW_SIMD_DECLARE(find_infinite_logit, const LogitRows& rows, int64_t row, int64_t* index)

}  // namespace winnow
