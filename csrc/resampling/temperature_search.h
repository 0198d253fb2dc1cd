// The step of a temperature: the largest d in (0, limit] at which a population reweighted by exp(d
// l) keeps its effective sample size. For particles of weight W and log likelihood l, that size is
//
//   share(d) = (sum W exp(d l))^2 / (sum W * sum W exp(2 d l))     of the whole, in (0, 1],
//
// which falls from 1 at d = 0. sqrt(-log share) is nearly linear in d (exactly so where l is
// normal), so secants of it find the level in a few steps; bisection of the bracket in between
// bounds their number. Shared by CPU and CUDA, hence functions of the caller's Math only.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define WINNOW_SEARCH __host__ __device__ inline
#else
#define WINNOW_SEARCH inline
#endif

namespace winnow {
namespace {

// `log_share` is called with steps in (0, limit], `range` is the largest l minus the smallest one.
// The result keeps the level: it comes from the side of the bracket on which the share is enough.
template <typename Math, typename LogShare>
WINNOW_SEARCH double largest_step(double limit, double range, double level, double tolerance,
                                  const LogShare& log_share) {
  if (range <= 0.0) return limit;
  const double goal = Math::sqrt(-Math::log(level));
  const auto excess = [&](double step) {
    const double loss = -log_share(step);
    return (loss > 0.0 ? Math::sqrt(loss) : 0.0) - goal;
  };
  double right_excess = excess(limit);
  if (right_excess <= 0.0) return limit;
  // Weights within a factor rho of each other share at least 4 rho / (1 + rho)^2 (Kantorovich), so
  // this step is safe: 1 / cosh^2(d range / 2) = level.
  double low = 2.0 * Math::log(Math::sqrt(1.0 / level) + Math::sqrt(1.0 / level - 1.0)) / range;
  if (low > limit) low = limit;
  double high = limit;
  // Ends of the secant; the left one is the origin until a step falls short of the root. Its target
  // lies a little before the root, so that the last step is one that keeps the level.
  double left = 0.0;
  double left_excess = -goal;
  const double target = -0.5 * tolerance * goal;
  // For normal likelihoods of some hundred particles the root is near 3 low; the limit may lie far
  // out, where the share no longer falls, and says little.
  double step = 3.0 * low;
  int side = 0;
  for (int n = 0; n < 150 && high - low > tolerance * high; ++n) {
    if (n % 4 == 3 || !(step > low && step < high)) {
      step = high > 4.0 * low ? Math::sqrt(low * high) : 0.5 * (low + high);
    }
    if (!(step > low && step < high)) break;
    const double e = excess(step);
    const double through_origin = step * (goal + target) / (goal + e);
    if (e > 0.0) {
      high = step;
      right_excess = e;
      if (side == 1) left_excess *= 0.5;  // Illinois: an end that stays is pulled in
      side = 1;
    } else {
      low = step;
      left = step;
      left_excess = e;
      if (-e <= tolerance * goal) break;
      if (side == -1) right_excess *= 0.5;
      side = -1;
    }
    const double slope = (right_excess - left_excess) / (high - left);
    step = n < 2 ? through_origin : left + (target - left_excess) / slope;
  }
  return low;
}

// What the level is a share of. Particles that no likelihood is left of are gone at any step: where
// the others can hold the target, it is counted in all particles, else in those others.
WINNOW_SEARCH double level_among_living(double target, double living_share) {
  return living_share > target ? target / living_share : target;
}

// The new temperature: `limit` exactly where it is reached, and otherwise above the old one by a
// rounding at least, so that a loop ends.
template <typename Real>
WINNOW_SEARCH Real next_in_schedule(double beta, double step, double max_beta, bool reached) {
  if (!(beta < max_beta)) return static_cast<Real>(beta);
  if (reached) return static_cast<Real>(max_beta);
  const double unit = sizeof(Real) == 8 ? 0x1p-52 : 0x1p-23;
  const double tiny = sizeof(Real) == 8 ? 0x1p-1022 : 0x1p-126;
  double next = static_cast<double>(static_cast<Real>(beta + step));
  if (!(next > static_cast<double>(static_cast<Real>(beta)))) {
    const double size = beta < 0.0 ? -beta : beta;
    next = beta + (size * unit > tiny ? size * unit : tiny);
  }
  return static_cast<Real>(next < max_beta ? next : max_beta);
}

}  // namespace
}  // namespace winnow
