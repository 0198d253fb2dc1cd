// ESS = (sum w)^2 / sum w^2 with w = exp(log_weight - max), two reads of a row that the second time
// comes from the cache. Sums are double, so that 1e7 equal particles count as 1e7.
#include "resampling/effective_sample_size_simd.h"

#include <cmath>
#include <type_traits>

#include "common/dispatch_simd.h"
#include "common/lanes.h"

namespace winnow::CPU_CAPABILITY {
namespace {

// NaN counts as no weight. With an infinite maximum the infinite weights share the mass.
template <typename T>
double row_ess(const T* row, int64_t n) {
  const float none = -std::numeric_limits<float>::infinity();
  f32x16 running = none;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) running = max_lanes(load_lanes(row + i), running);
  if (i < n) running = max_lanes(load_lanes(row + i, n - i, none), running);
  const float top = max_lane(running);
  if (top == none) return 0.0;
  double sum = 0.0;
  double squares = 0.0;
  const auto accumulate = [&](f32x16 x) {
    const f32x16 w = std::isinf(top) ? select(x == f32x16(top), f32x16(1.0f), f32x16(0.0f))
                                     : select(x == x, exp_lanes(x - top), f32x16(0.0f));
    sum += sum_lanes(w);
    squares += sum_lanes(w * w);
  };
  for (i = 0; i + kLanes <= n; i += kLanes) accumulate(load_lanes(row + i));
  if (i < n) accumulate(load_lanes(row + i, n - i, none));
  return sum * sum / squares;
}

template <>
double row_ess(const double* row, int64_t n) {
  double top = -std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < n; ++i) top = row[i] > top ? row[i] : top;
  if (top == -std::numeric_limits<double>::infinity()) return 0.0;
  double sum = 0.0;
  double squares = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    // An infinite maximum gives exp(-inf) = 0 to the finite ones and NaN - inf is not below it.
    const double w = row[i] == top ? 1.0 : row[i] < top ? std::exp(row[i] - top) : 0.0;
    sum += w;
    squares += w * w;
  }
  return sum * sum / squares;
}

}  // namespace

void effective_sample_size_rows(const void* log_weights, ElementType type, int64_t stride,
                                int64_t rows, int64_t particles, void* result) {
  dispatch_element(type, [&](auto zero) {
    using T = decltype(zero);
    using Result = std::conditional_t<std::is_same_v<T, double>, double, float>;
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = static_cast<const T*>(log_weights) + r * stride;
      static_cast<Result*>(result)[r] = static_cast<Result>(row_ess(row, particles));
    }
  });
}

}  // namespace winnow::CPU_CAPABILITY
