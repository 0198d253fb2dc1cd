// log(mean w) = top + log(S / K) and entropy = log S - sum w (log w) / S, with w = exp(log_weight -
// top) and S = sum w: two reads of a row that the second time comes from the cache. Sums are double
// and in the order of `resample`, so that log_mean_exp is its log_z.
#include "resampling/weight_statistics_simd.h"

#include <limits>

#include "common/dispatch_simd.h"
#include "resampling/resample_simd.h"
#include "resampling/weigh.h"

namespace winnow::CPU_CAPABILITY {
namespace {

constexpr int64_t kTile = 256;  // weights at a time: 2 KB on the stack

// w log w of n weights and zeros up to a multiple of kLanes. What lies 100 below the top weighs
// nothing, NaN neither, so their logarithm may be any number; with an infinite top all logs are 0.
template <typename T>
void weighted_logs(const T* x, const float* w, int64_t n, double top, float* result) {
  const float none = -std::numeric_limits<float>::infinity();
  const auto highest = static_cast<float>(top);
  const f32x16 keep = highest == std::numeric_limits<float>::infinity() ? 0.0f : 1.0f;
  for (int64_t i = 0; i < n; i += kLanes) {
    const f32x16 v = n - i < kLanes ? load_lanes(x + i, n - i, none) : load_lanes(x + i);
    const f32x16 log_w = min_lanes(max_lanes(v - f32x16(highest), -100.0f), 0.0f);
    store_lanes(result + i, load_lanes(w + i) * log_w * keep);
  }
}

void weighted_logs(const double* x, const double* w, int64_t n, double top, double* result) {
  const bool infinite = top == std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < n; ++i) result[i] = w[i] > 0.0 && !infinite ? w[i] * (x[i] - top) : 0.0;
  for (int64_t i = n; i % kLanes != 0; ++i) result[i] = 0.0;
}

template <typename T>
double row_statistic(WeightStatistic statistic, const T* row, int64_t n) {
  const double none = -std::numeric_limits<double>::infinity();
  Block whole;
  block_top(row, n, &whole);
  if (whole.top == none) return statistic == WeightStatistic::kEntropy ? 0.0 : none;
  double sum = 0.0;
  double logs = 0.0;
  WeightOf<T> tile[kTile];
  WeightOf<T> products[kTile];
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t end = n - first < kBlock ? n : first + kBlock;
    Sums weights;
    Sums moments;
    for (int64_t i = first; i < end; i += kTile) {
      const int64_t count = end - i < kTile ? end - i : kTile;
      block_weights(row + i, count, whole.top, tile);
      weights.add(tile, count);
      if (statistic == WeightStatistic::kLogMeanExp) continue;
      weighted_logs(row + i, tile, count, whole.top, products);
      moments.add(products, count);
    }
    sum += sum_wide(weights.sum[0] + weights.sum[1]);
    logs += sum_wide(moments.sum[0] + moments.sum[1]);
  }
  if (statistic == WeightStatistic::kEntropy) {
    const double entropy = log_of(sum) - logs / sum;
    return entropy > 0.0 ? entropy : 0.0;  // a single particle's may round below
  }
  return log_of(sum / static_cast<double>(n)) + whole.top;
}

}  // namespace

void weight_statistic_rows(WeightStatistic statistic, const void* log_weights, ElementType type,
                           int64_t stride, int64_t rows, int64_t particles, void* result) {
  dispatch_element(type, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = static_cast<const T*>(log_weights) + r * stride;
      static_cast<WeightOf<T>*>(result)[r] =
          static_cast<WeightOf<T>>(row_statistic(statistic, row, particles));
    }
  });
}

}  // namespace winnow::CPU_CAPABILITY
