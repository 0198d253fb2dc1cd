#pragma once

#include <cstdint>

#include "common/cpu_capability.h"
#include "common/element_type.h"

namespace winnow {

struct TemperingCall {
  const void* log_likelihood;  // row r at r * likelihood_stride elements
  const void* log_weights;     // the same of weights_stride; null: all equal
  ElementType type;
  int64_t likelihood_stride;
  int64_t weights_stride;
  int64_t particles;
  const double* beta;  // one a row
  double target;
  double max_beta;
  void* result;  // one a row: float, or double with `wide`
  bool wide;
};

namespace {

// The likelihoods that count, and weights in double beside them.
[[maybe_unused]] inline int64_t tempering_scratch(const TemperingCall& call) {
  const bool doubles = call.log_weights != nullptr || call.type == ElementType::kDouble;
  const int64_t bytes = call.particles * (call.log_weights != nullptr ? 16 : doubles ? 8 : 4);
  return (bytes + 127) / 64 * 64;
}

}  // namespace

// Rows [begin, end).
WINNOW_SIMD_DECLARE(next_temperature_rows, const TemperingCall& call, int64_t begin, int64_t end,
                    void* scratch)
// The effective sample size of log_weights once exp(log_likelihood) has been put on them.
WINNOW_SIMD_DECLARE(conditional_ess_rows, const TemperingCall& call, int64_t begin, int64_t end,
                    void* scratch)

}  // namespace winnow
