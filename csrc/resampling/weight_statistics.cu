// winnow::log_mean_exp and winnow::weight_entropy on the GPU. One read of the weights: a thread
// keeps (top, sum w, sum w log w) of what it has seen, relative to its own largest, and such
// triples merge exactly. A warp or a block has a population of its own.
#include "common/device.h"
#include "resampling/populations.h"

namespace winnow {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kWarpParticles = 512;  // beyond this a whole block is faster than one warp

// Relative to the largest; with an infinite one the infinite particles share the mass.
struct Moments {
  double top;
  double sum;
  double logs;  // sum w log w
};

constexpr double kNone = -std::numeric_limits<double>::infinity();

// `moments` as seen from a top that is not lower.
WINNOW_DEVICE Moments lowered(const Moments& moments, double top) {
  if (moments.top == top || moments.sum == 0.0) return {top, moments.sum, moments.logs};
  const double shift = moments.top - top;  // -inf below an infinite top
  const double scale = exp(shift);
  if (scale == 0.0) return {top, 0.0, 0.0};
  return {top, moments.sum * scale, (moments.logs + moments.sum * shift) * scale};
}

WINNOW_DEVICE Moments merge(const Moments& a, const Moments& b) {
  const double top = a.top > b.top ? a.top : b.top;
  const Moments x = lowered(a, top);
  const Moments y = lowered(b, top);
  return {top, x.sum + y.sum, x.logs + y.logs};
}

template <typename T>
WINNOW_DEVICE Moments scan(Global<const T> weights, int64_t first, int64_t step, int64_t n) {
  Moments seen = {kNone, 0.0, 0.0};
  for (int64_t i = first; i < n; i += step) {
    const double x = static_cast<double>(static_cast<T>(weights[i]));
    if (x > kNone) seen = merge(seen, {x, 1.0, 0.0});  // false for NaN, which is no weight
  }
  return seen;
}

WINNOW_DEVICE double entropy_of(const Moments& moments) {
  if (moments.sum == 0.0) return 0.0;
  const double entropy = log(moments.sum) - moments.logs / moments.sum;
  return entropy > 0.0 ? entropy : 0.0;
}

WINNOW_DEVICE double mean_of(const Moments& moments, int64_t n) {
  return moments.sum == 0.0 ? kNone : moments.top + log(moments.sum / static_cast<double>(n));
}

template <typename T, typename Real, int kWidth>
WINNOW_KERNEL(kThreads)
weigh_populations(Global<const T> weights, int64_t stride, int64_t rows, int64_t particles,
                  bool entropy, Global<Real> result) {
  WINNOW_SHARED(Moments, scratch, kThreads / kWarp);
  const int64_t row = block_index() * (kThreads / kWidth) + thread_index() / kWidth;
  Moments moments = {kNone, 0.0, 0.0};
  if (row < rows) {
    moments = scan<T>(weights + row * stride, thread_index() % kWidth, kWidth, particles);
  }
  moments = kWidth == kWarp ? warp_reduce(moments, merge)
                            : block_reduce<kThreads>(moments, Shared<Moments>(scratch), merge);
  if (row < rows && thread_index() % kWidth == 0) {
    result[row] = static_cast<Real>(entropy ? entropy_of(moments) : mean_of(moments, particles));
  }
}

// ---- launchers ----

template <bool kEntropy>
Tensor weight_statistic_cuda(const Tensor& log_weights) {
  check_populations("log_weights", log_weights, check_device);
  const Stream stream(log_weights);
  const Rows rows = as_rows(log_weights);
  Tensor result = empty(leading_shape(log_weights), statistics_dtype(log_weights), log_weights);
  dispatch_floating(log_weights, [&](auto zero) {
    using T = decltype(zero);
    using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const auto run = [&](auto kernel, int64_t blocks) {
      launch("weight_statistics", kernel, {blocks}, kThreads, stream, global<const T>(rows.tensor),
             rows.stride, rows.count, rows.length, kEntropy, global<Real>(result));
    };
    if (rows.length <= kWarpParticles) {
      run(weigh_populations<T, Real, kWarp>, ceil_div<int64_t>(rows.count, kThreads / kWarp));
    } else {
      run(weigh_populations<T, Real, kThreads>, rows.count);
    }
  });
  return result;
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("log_mean_exp", TORCH_BOX(&winnow::weight_statistic_cuda<false>));
  m.impl("weight_entropy", TORCH_BOX(&winnow::weight_statistic_cuda<true>));
}
