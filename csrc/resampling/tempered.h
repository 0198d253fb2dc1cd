// A population reweighted by exp(d l), l a log likelihood, and its conditional effective sample
// size (Zhou, Johansen and Aston 2016, section 3.2), as a share of the number of particles:
// (sum W v)^2 / (sum W * sum W v^2) with v = exp(d l). NaN counts as -inf, in weights and in
// likelihoods; infinite ones share what there is. Sums are double and in one order.
//
// Included by *_simd.cc only.
#pragma once

#include <cstdint>
#include <limits>

#include "resampling/fixed_point.h"
#include "resampling/weigh.h"

namespace winnow {
namespace {

constexpr double kNone = -std::numeric_limits<double>::infinity();
constexpr double kInfinite = std::numeric_limits<double>::infinity();

// The particles that have weight and likelihood, gathered at the front of the arrays.
template <typename W>
struct Living {
  W* log_likelihood;   // relative to the largest
  double* log_weight;  // null: all equal
  int64_t count;
  double share;  // of the weight
  double range;  // of the log likelihoods
  double log_weight_sum;
};

inline double exp_of(double x) {  // x <= 0
  double part[kWide];
  const f64x8 v = exp_wide(wide(x));
  std::memcpy(part, &v, sizeof v);
  return part[0];
}

inline double largest(const double* x, int64_t n) {
  double top = kNone;
  for (int64_t i = 0; i < n; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

// Elements i to i + 7 of an array of n, -inf beyond.
inline f64x8 load_some(const double* x, int64_t i, int64_t n) {
  if (n - i >= kWide) return load_wide(x + i);
  double part[kWide];
  for (int64_t l = 0; l < kWide; ++l) part[l] = i + l < n ? x[i + l] : kNone;
  return load_wide(part);
}

inline double sum_of_exp(const double* x, int64_t n) {
  f64x8 sum = wide(0.0);
  for (int64_t i = 0; i < n; i += kWide) sum = sum + exp_wide(load_some(x, i, n));
  return sum_wide(sum);
}

// log sum exp(weight + d likelihood).
inline double log_sum(const double* weight, const double* likelihood, double d, int64_t n) {
  double top = kNone;
  for (int64_t i = 0; i < n; ++i) {
    const double x = weight[i] + d * likelihood[i];
    top = x > top ? x : top;
  }
  if (top == kNone) return kNone;
  f64x8 sum = wide(0.0);
  for (int64_t i = 0; i < n; i += kWide) {
    const f64x8 x = load_some(weight, i, n) + wide(d) * load_some(likelihood, i, n);
    sum = sum + exp_wide(x - wide(top));
  }
  return top + log_of(sum_wide(sum));
}

// An infinite top: those that have it are all there is.
inline void relative_to(double top, double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    x[i] = top == kInfinite ? (x[i] == top ? 0.0 : kNone) : x[i] - top;
  }
}

template <typename T, typename W>
Living<W> gather_equal(const T* likelihood, int64_t n, W* memory) {
  Living<W> living = {memory, nullptr, 0, 0.0, 0.0, 0.0};
  carry(likelihood, n, memory);
  Block whole;
  block_top(memory, n, &whole);
  const W top = static_cast<W>(whole.top);
  const W least =
      top == std::numeric_limits<W>::infinity() ? top : std::numeric_limits<W>::lowest();
  W lowest = top;
  for (int64_t i = 0; i < n; ++i) {
    const W l = memory[i];
    memory[living.count] = l - top;
    lowest = l >= least && l < lowest ? l : lowest;
    living.count += l >= least ? 1 : 0;
  }
  living.range = top > lowest ? static_cast<double>(top - lowest) : 0.0;
  living.share = static_cast<double>(living.count) / static_cast<double>(n > 0 ? n : 1);
  return living;
}

template <typename T>
void to_doubles(const T* x, int64_t n, double* result) {
  constexpr int64_t kPiece = 256;
  WeightOf<T> piece[kPiece];
  for (int64_t i = 0; i < n; i += kPiece) {
    const int64_t count = n - i < kPiece ? n - i : kPiece;
    carry(x + i, count, piece);
    for (int64_t j = 0; j < count; ++j) result[i + j] = piece[j];
  }
}

template <typename T>
Living<double> gather_weighted(const T* likelihood, const T* weights, int64_t n, double* memory) {
  double* l = memory;
  double* a = memory + n;
  Living<double> living = {l, a, 0, 0.0, 0.0, 0.0};
  to_doubles(likelihood, n, l);
  to_doubles(weights, n, a);
  const double top_weight = largest(a, n);
  if (top_weight == kNone) return living;
  relative_to(top_weight, a, n);
  for (int64_t i = 0; i < n; ++i) l[i] = a[i] > kNone ? l[i] : kNone;
  const double top = largest(l, n);
  const double all = sum_of_exp(a, n);
  if (top == kNone) return living;
  relative_to(top, l, n);
  for (int64_t i = 0; i < n; ++i) {
    if (!(l[i] > kNone)) continue;
    living.range = -l[i] > living.range ? -l[i] : living.range;
    l[living.count] = l[i];
    a[living.count++] = a[i];
  }
  living.log_weight_sum = log_sum(a, l, 0.0, living.count);
  const double part = living.log_weight_sum - log_of(all);
  living.share = exp_of(part < 0.0 ? part : 0.0);
  return living;
}

// log of (sum W v)^2 / (sum W * sum W v^2), over the living.
inline double log_share(const Living<double>& living, double d) {
  if (living.log_weight != nullptr) {
    const double once = log_sum(living.log_weight, living.log_likelihood, d, living.count);
    const double twice = log_sum(living.log_weight, living.log_likelihood, 2.0 * d, living.count);
    return 2.0 * once - living.log_weight_sum - twice;
  }
  f64x8 total = wide(0.0);
  f64x8 total_squares = wide(0.0);
  for (int64_t i = 0; i < living.count; i += kWide) {
    const f64x8 v = exp_wide(wide(d) * load_some(living.log_likelihood, i, living.count));
    total = total + v;
    total_squares = total_squares + v * v;
  }
  const double sum = sum_wide(total);
  const double squares = sum_wide(total_squares);
  return log_of(sum * sum / (squares * static_cast<double>(living.count)));
}

// Equal weights in float: one exponential a particle, sums in double.
inline double log_share(const Living<float>& living, double d) {
  const f32x16 step = static_cast<float>(d);
  alignas(64) float tile[kLanes];
  Sums sums;
  for (int64_t i = 0; i < living.count; i += kLanes) {
    const float* l = living.log_likelihood + i;
    const f32x16 v = living.count - i < kLanes
                         ? load_lanes(l, living.count - i, static_cast<float>(kNone))
                         : load_lanes(l);
    store_lanes(tile, exp_lanes(v * step));
    sums.add(tile, kLanes);
  }
  const double sum = sum_wide(sums.sum[0] + sums.sum[1]);
  const double squares = sum_wide(sums.squares[0] + sums.squares[1]);
  return log_of(sum * sum / (squares * static_cast<double>(living.count)));
}

}  // namespace
}  // namespace winnow
