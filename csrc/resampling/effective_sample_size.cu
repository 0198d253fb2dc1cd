// winnow::effective_sample_size on the GPU. One read of the weights: a thread keeps (top, sum w,
// sum w^2) of what it has seen, relative to its own largest, and such triples merge exactly. Small
// populations get a warp each, large ones several blocks whose triples a second launch merges.
#include "common/device.h"
#include "resampling/populations.h"

namespace winnow {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpParticles = 512;    // beyond this a whole block is faster than one warp
constexpr int64_t kSlice = 64 * 1024;  // of a population that several blocks share

// Weights relative to the largest; sums are double, so that 1e7 equal particles count as 1e7. With
// an infinite largest, the infinite ones share the mass: nothing finite is in the sums then.
struct WeightSums {
  double top;
  double sum;
  double squares;
};

WINNOW_DEVICE WeightSums no_weight() {
  return {-std::numeric_limits<double>::infinity(), 0.0, 0.0};
}

// exp(x - top) for x <= top, 1 where both are the same infinity.
template <typename T>
WINNOW_DEVICE T relative_weight(T x, T top) {
  return x == top ? T(1) : exp(x - top);
}

WINNOW_DEVICE WeightSums merge(const WeightSums& a, const WeightSums& b) {
  const double top = a.top > b.top ? a.top : b.top;
  const double scale_a = relative_weight(a.top, top);
  const double scale_b = relative_weight(b.top, top);
  return {top, a.sum * scale_a + b.sum * scale_b,
          a.squares * (scale_a * scale_a) + b.squares * (scale_b * scale_b)};
}

WINNOW_DEVICE double sample_size(const WeightSums& sums) {
  return sums.sum > 0.0 ? sums.sum * sums.sum / sums.squares : 0.0;
}

// Elements first, first + step, ... below n. Statistics of half precision and float are in float.
template <typename Real, typename T>
WINNOW_DEVICE WeightSums scan(Global<const T> weights, int64_t first, int64_t step, int64_t n) {
  Real top = -std::numeric_limits<Real>::infinity();
  double sum = 0.0;
  double squares = 0.0;
  for (int64_t i = first; i < n; i += step) {
    const Real x = static_cast<Real>(weights[i]);
    if (x > top) {
      const double scale = top == -std::numeric_limits<Real>::infinity() ? 0.0 : exp(top - x);
      sum *= scale;
      squares *= scale * scale;
      top = x;
    }
    // False for NaN, which is no weight, and for -infinity.
    if (x > -std::numeric_limits<Real>::infinity()) {
      const double w = relative_weight(x, top);
      sum += w;
      squares += w * w;
    }
  }
  return {static_cast<double>(top), sum, squares};
}

template <typename T, typename Real>
WINNOW_KERNEL(kThreads)
small_populations(Global<const T> weights, int64_t stride, int64_t rows, int64_t particles,
                  Global<Real> result) {
  const int64_t row = block_index() * (kThreads / kWarp) + warp_index();
  if (row >= rows) return;
  WeightSums sums = scan<Real>(weights + row * stride, lane_index(), kWarp, particles);
  sums = warp_reduce(sums, merge);
  if (lane_index() == 0) result[row] = static_cast<Real>(sample_size(sums));
}

template <typename T, typename Real>
WINNOW_KERNEL(kThreads)
population_slices(Global<const T> weights, int64_t stride, int64_t particles,
                  Global<double> partial) {
  WINNOW_SHARED(WeightSums, scratch, kThreads / kWarp);
  const int64_t begin = block_index_y() * kSlice;
  const int64_t n = particles - begin < kSlice ? particles - begin : kSlice;
  WeightSums sums =
      scan<Real>(weights + block_index() * stride + begin, thread_index(), kThreads, n);
  sums = block_reduce<kThreads>(sums, Shared<WeightSums>(scratch), merge);
  if (thread_index() == 0) {
    const int64_t slices = ceil_div(particles, kSlice);
    Global<double> mine = partial + 3 * (block_index() * slices + block_index_y());
    mine[0] = sums.top;
    mine[1] = sums.sum;
    mine[2] = sums.squares;
  }
}

template <typename Real>
WINNOW_KERNEL(kThreads)
merge_slices(Global<const double> partial, int64_t rows, int64_t slices, Global<Real> result) {
  const int64_t row = block_index() * (kThreads / kWarp) + warp_index();
  if (row >= rows) return;
  WeightSums sums = no_weight();
  for (int64_t s = lane_index(); s < slices; s += kWarp) {
    Global<const double> slice = partial + 3 * (row * slices + s);
    sums = merge(sums, {slice[0], slice[1], slice[2]});
  }
  sums = warp_reduce(sums, merge);
  if (lane_index() == 0) result[row] = static_cast<Real>(sample_size(sums));
}

// ---- launchers ----

template <typename T>
void measure(const Rows& rows, const Tensor& result, const Stream& stream) {
  using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const auto weights = global<const T>(rows.tensor);
  const auto out = global<Real>(result);
  const Grid warps = {ceil_div<int64_t>(rows.count, kThreads / kWarp)};
  if (rows.length <= kWarpParticles) {
    launch("effective_sample_size", small_populations<T, Real>, warps, kThreads, stream, weights,
           rows.stride, rows.count, rows.length, out);
    return;
  }
  const int64_t slices = ceil_div(rows.length, kSlice);
  const Tensor partial = empty({rows.count, slices, 3}, ScalarType::Double, result);
  launch("effective_sample_size", population_slices<T, Real>, {rows.count, slices}, kThreads,
         stream, weights, rows.stride, rows.length, global<double>(partial));
  launch("effective_sample_size", merge_slices<Real>, warps, kThreads, stream,
         global<const double>(partial), rows.count, slices, out);
}

Tensor effective_sample_size_cuda(const Tensor& log_weights) {
  check_populations("log_weights", log_weights, check_device);
  const Stream stream(log_weights);
  const Rows rows = as_rows(log_weights);
  Tensor result = empty(leading_shape(log_weights), statistics_dtype(log_weights), log_weights);
  dispatch_floating(log_weights, [&](auto zero) { measure<decltype(zero)>(rows, result, stream); });
  return result;
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("effective_sample_size", TORCH_BOX(&winnow::effective_sample_size_cuda));
}
