#pragma once

#include "common/cpu_capability.h"
#include "unmasking/logit_rows.h"

namespace winnow {

// What a token is drawn from: the target's distribution at one row, less the draft's where it has
// one. Probabilities are exp((x - reference) / temperature) * share.
struct ResidualRow {
  int64_t target;
  float target_reference;
  float target_share;
  int64_t draft;  // -1: nothing is taken away
  float draft_reference;
  float draft_share;
  int64_t excluded;  // a token that must not be drawn, or -1
};

// Sum of max(p - q, 0) over one block of the vocabulary.
WINNOW_SIMD_DECLARE(sum_residual_block, const LogitRows& target, const LogitRows& draft,
                    const ResidualRow& row, double temperature, int64_t block, double* mass)

// A token of one block drawn in proportion to max(p - q, 0), by inverting the distribution function
// at `uniform` in [0, 1); -1 where the block has no mass.
WINNOW_SIMD_DECLARE(draw_in_residual_block, const LogitRows& target, const LogitRows& draft,
                    const ResidualRow& row, double temperature, int64_t block, double uniform,
                    int64_t* token)

}  // namespace winnow
