#pragma once

#include <cstdint>

#include "common/cpu_capability.h"
#include "common/element_type.h"
#include "resampling/design.h"

namespace winnow {

struct SampleCall {
  const void* log_weights;  // row r at r * stride elements
  ElementType type;
  int64_t stride;
  int64_t particles;
  int64_t k;
  Design design;
  uint64_t seed;
  int64_t* indices;  // null: inclusion probabilities of all, of conditional Poisson sampling
  void* inclusion;   // float, or double for double weights, as `weights`
  void* weights;
};

namespace {

// Rows of the dynamic programme: counts 0 to k, zeros before and after.
constexpr int64_t kRowMargin = 8;

[[maybe_unused]] inline int64_t count_row(int64_t k) {
  return (k + 1 + kRowMargin + 7) / 8 * 8 + kRowMargin;
}

// Every so many particles a row of the programme is kept; those between are made again.
[[maybe_unused]] inline int64_t rows_between(int64_t particles) {
  int64_t root = 1;
  while (root * root < particles) ++root;
  return root;
}

[[maybe_unused]] inline int64_t sample_scratch(const SampleCall& call) {
  const int64_t n = call.particles;
  int64_t words = 8 + n + 2 * (call.k + 2);  // log weights and the picks
  if (call.design == Design::kConditionalPoisson) {
    const int64_t root = rows_between(n);
    words += 3 * n + (2 * root + 6) * count_row(call.k);
  }
  return 8 * words;
}

}  // namespace

// Rows [begin, end).
WINNOW_SIMD_DECLARE(sample_rows, const SampleCall& call, int64_t begin, int64_t end, void* scratch)

}  // namespace winnow
