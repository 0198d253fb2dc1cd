#pragma once

#include "common/cpu_capability.h"
#include "unmasking/logit_rows.h"

namespace winnow {

// What top-k (0: all) and then top-p (1: all) keep of a row whose largest logit is `reference` and
// whose sum of exp((x - reference) / temperature) is `mass`. `scratch` holds vocab floats.
WINNOW_SIMD_DECLARE(find_truncation, const LogitRows& rows, int64_t row, float reference,
                    double temperature, int64_t top_k, double top_p, double mass, float* scratch,
                    Truncation* kept)

// Sums of the kept part of every block of a row, relative to `reference`.
WINNOW_SIMD_DECLARE(sum_kept_blocks, const LogitRows& rows, int64_t row, float reference,
                    double temperature, const Truncation& kept, LogitBlockSums* sums)

// Sum of exp(t) (t - u) over the kept part of one block, t and u being (x - reference) /
// temperature of the row and of the same row of `previous`, in the units of
// LogitBlockSums::moment. Infinite where the previous row has no mass.
WINNOW_SIMD_DECLARE(cross_logit_block, const LogitRows& rows, const LogitRows& previous,
                    int64_t row, int64_t block, float reference, float previous_reference,
                    double temperature, const Truncation& kept, float* cross)

}  // namespace winnow
