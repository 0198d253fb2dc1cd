// Log weights to weights: the maximum, exp(log_weight - maximum), their sum and sum of squares, and
// the fixed-point total. Three reads of a block that the second and third time come from the cache.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "resampling/fixed_point.h"

namespace winnow {
namespace {

template <typename T>
using WeightOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct Block {
  double top;
  double sum;
  double squares;
  uint64_t total;
  uint64_t start;  // sum of the totals before
  int64_t kept;    // optimal: particles kept before
  bool nan;
};

template <typename T>
inline void block_top(const T* x, int64_t n, Block* block) {
  const float none = -std::numeric_limits<float>::infinity();
  f32x16 running = none;
  i32x16 nan = 0;
  const auto take = [&](f32x16 v) {
    running = max_lanes(v, running);
    nan = nan | (v != v);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) take(load_lanes(x + i));
  if (i < n) take(load_lanes(x + i, n - i, none));
  block->top = max_lane(running);
  block->nan = any(nan);
}

template <>
inline void block_top(const double* x, int64_t n, Block* block) {
  double top = -std::numeric_limits<double>::infinity();
  bool nan = false;
  for (int64_t i = 0; i < n; ++i) {
    top = x[i] > top ? x[i] : top;
    nan |= x[i] != x[i];
  }
  block->top = top;
  block->nan = nan;
}

// Writes n weights, and zeros up to a multiple of kLanes. With an infinite top the infinite log
// weights share the mass; a NaN weighs nothing.
template <typename T>
__attribute__((flatten)) inline void block_weights(const T* x, int64_t n, double top, float* w) {
  const float none = -std::numeric_limits<float>::infinity();
  const float highest = static_cast<float>(top);
  const auto each = [&](auto weight) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store_lanes(w + i, weight(load_lanes(x + i)));
    if (i < n) store_lanes(w + i, weight(load_lanes(x + i, n - i, none)));
  };
  if (highest == std::numeric_limits<float>::infinity()) {
    each([&](f32x16 v) { return as_float((v == f32x16(highest)) & as_bits(f32x16(1.0f))); });
  } else {
    each([&](f32x16 v) { return as_float((v == v) & as_bits(exp_lanes(v - f32x16(highest)))); });
  }
}

inline void block_weights(const double* x, int64_t n, double top, double* w) {
  const bool infinite = top == std::numeric_limits<double>::infinity();
  double part[kWide];
  for (int64_t i = 0; i < n; i += kWide) {
    const int64_t count = n - i < kWide ? n - i : kWide;
    for (int64_t l = 0; l < kWide; ++l) part[l] = l < count ? x[i + l] - top : -1e300;
    if (infinite) {
      for (int64_t l = 0; l < count; ++l) part[l] = x[i + l] == top ? 0.0 : -1e300;
    }
    const f64x8 weight = exp_wide(load_wide(part));
    std::memcpy(w + i, &weight, sizeof weight);
  }
  for (int64_t i = (n + kWide - 1) / kWide * kWide; i < (n + kLanes - 1) / kLanes * kLanes; ++i) {
    w[i] = 0.0;
  }
}

// The log weights as statistics, a NaN as no weight.
template <typename T>
inline void carry(const T* x, int64_t n, float* result) {
  const f32x16 none = -std::numeric_limits<float>::infinity();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const f32x16 v = load_lanes(x + i);
    store_lanes(result + i, select(v == v, v, none));
  }
  if (i == n) return;
  const f32x16 v = load_lanes(x + i, n - i, 0.0f);
  const f32x16 kept = select(v == v, v, none);
  std::memcpy(result + i, &kept, static_cast<size_t>(n - i) * sizeof(float));
}

inline void carry(const double* x, int64_t n, double* result) {
  for (int64_t i = 0; i < n; ++i) {
    result[i] = x[i] == x[i] ? x[i] : -std::numeric_limits<double>::infinity();
  }
}

// Sum and sum of squares of the weights of a block, which may come in pieces of whole lanes.
struct Sums {
  f64x8 sum[2] = {wide(0.0), wide(0.0)};
  f64x8 squares[2] = {wide(0.0), wide(0.0)};

  template <typename W>
  void add(const W* w, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
      for (int h = 0; h < 2; ++h) {
        const f64x8 v = load_wide(w + i + h * kWide);
        sum[h] = sum[h] + v;
        squares[h] = squares[h] + v * v;
      }
    }
  }
};

template <typename W>
inline void block_sums(const W* w, int64_t n, Block* block) {
  Sums sums;
  sums.add(w, n);
  block->sum = sum_wide(sums.sum[0] + sums.sum[1]);
  block->squares = sum_wide(sums.squares[0] + sums.squares[1]);
}

template <typename W>
inline u64x8 fixed_weights(const W* w, double scale) {
  return to_words(load_wide(w) * wide(scale));
}

template <typename W>
inline void block_total(const W* w, int64_t n, double scale, Block* block) {
  u64x8 total = {};
  for (int64_t i = 0; i < n; i += kWide) {
    const u64x8 q = fixed_weights(w + i, scale);
    for (int p = 0; p < kParts; ++p) total.part[p] += q.part[p];
  }
  block->total = sum_wide(total);
}

// Cumulative weights of one tile (n padded to kWide), continued from `before`; returns the last.
template <typename W>
inline uint64_t cumulate(const W* w, int64_t n, double scale, uint64_t before,
                         uint64_t* cumulative) {
  for (int64_t i = 0; i < n; i += kWide) {
    const u64x8 q = fixed_weights(w + i, scale);
    std::memcpy(cumulative + i, &q, sizeof q);
    for (int l = 0; l < kWide; ++l) cumulative[i + l] = before += cumulative[i + l];
  }
  return before;
}

}  // namespace
}  // namespace winnow
