// ESS = (sum w)^2 / sum w^2 with w = exp(log_weight - max), two reads of a row that the second time
// comes from the cache. Sums are double, so that 1e7 equal particles count as 1e7, and in the order
// of `resample`, so that both say the same.
#include "resampling/effective_sample_size_simd.h"

#include <limits>

#include "common/dispatch_simd.h"
#include "resampling/resample_simd.h"
#include "resampling/weigh.h"

namespace winnow::CPU_CAPABILITY {
namespace {

constexpr int64_t kTile = 256;  // weights at a time: 2 KB on the stack

template <typename T>
double row_ess(const T* row, int64_t n) {
  Block whole;
  block_top(row, n, &whole);
  if (whole.top == -std::numeric_limits<double>::infinity()) return 0.0;
  double sum = 0.0;
  double squares = 0.0;
  WeightOf<T> tile[kTile];
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t end = n - first < kBlock ? n : first + kBlock;
    Sums sums;
    for (int64_t i = first; i < end; i += kTile) {
      const int64_t count = end - i < kTile ? end - i : kTile;
      block_weights(row + i, count, whole.top, tile);
      sums.add(tile, count);
    }
    sum += sum_wide(sums.sum[0] + sums.sum[1]);
    squares += sum_wide(sums.squares[0] + sums.squares[1]);
  }
  return sum * sum / squares;
}

}  // namespace

void effective_sample_size_rows(const void* log_weights, ElementType type, int64_t stride,
                                int64_t rows, int64_t particles, void* result) {
  dispatch_element(type, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = static_cast<const T*>(log_weights) + r * stride;
      static_cast<WeightOf<T>*>(result)[r] = static_cast<WeightOf<T>>(row_ess(row, particles));
    }
  });
}

}  // namespace winnow::CPU_CAPABILITY
