#pragma once

#include "common/cpu_capability.h"
#include "unmasking/logit_rows.h"

namespace winnow {

// Sums of `units` consecutive blocks: unit u is block u % blocks of row active[u / blocks].
WINNOW_SIMD_DECLARE(scan_logit_blocks, const LogitRows& rows, const int64_t* active, int64_t unit,
                    int64_t units, double temperature, double draw_temperature,
                    LogitBlockSums* sums)

// A token of one block drawn in proportion to exp(x / temperature), by inverting the distribution
// function at `uniform` in [0, 1); only what `kept` keeps.
WINNOW_SIMD_DECLARE(draw_in_logit_block, const LogitRows& rows, int64_t row, int64_t block,
                    float reference, double temperature, double uniform, const Truncation& kept,
                    int64_t* token)

// Logits begin to begin + n - 1 of a row as the loops load them.
WINNOW_SIMD_DECLARE(copy_logits, const LogitRows& rows, int64_t row, int64_t begin, int64_t n,
                    float* logits)

}  // namespace winnow
