#pragma once

#include "common/cpu_capability.h"
#include "unmasking/logit_rows.h"

namespace winnow {

// Token ids and weights exp((x - reference) / temperature) of what `kept` keeps of a row, in order
// of the vocabulary; tokens too small for a float are left out. Room for vocab entries.
WINNOW_SIMD_DECLARE(collect_kept, const LogitRows& rows, int64_t row, float reference,
                    double temperature, const Truncation& kept, int64_t* ids, float* weights,
                    int64_t* count)

// out = base * base_share + share * (sum of weights[i] times row ids[i] of a matrix), in float,
// rounded to the matrix' type at the end. `scratch` holds `width` floats.
WINNOW_SIMD_DECLARE(mix_rows, ElementType type, const void* matrix, int64_t stride, int64_t width,
                    const int64_t* ids, const float* weights, int64_t count, float share,
                    const void* base, float base_share, float* scratch, void* out)

}  // namespace winnow
