// The next temperature of each population: its particles are gathered once, then every step of the
// search reads them from the cache.
#include "resampling/next_temperature_simd.h"

#include "common/dispatch_simd.h"
#include "resampling/temperature_search.h"
#include "resampling/tempered.h"

namespace winnow::CPU_CAPABILITY {
namespace {

struct Math {
  static double log(double x) { return log_of(x); }
  static double sqrt(double x) { return __builtin_sqrt(x); }
};

template <typename Real, typename W>
Real next_temperature(const TemperingCall& call, double beta, const Living<W>& living) {
  const double limit = call.max_beta - beta;
  if (!(limit > 0.0) || living.count == 0) {
    return next_in_schedule<Real>(beta, limit, call.max_beta, true);
  }
  // The step is needed to the rounding of the result.
  const double tolerance = sizeof(W) == 8 && sizeof(Real) == 8 ? 0x1p-46 : 0x1p-23;
  const double step =
      largest_step<Math>(limit, living.range, level_among_living(call.target, living.share),
                         tolerance, [&](double d) { return log_share(living, d); });
  return next_in_schedule<Real>(beta, step, call.max_beta, step >= limit);
}

template <typename T, typename Use>
void each_row(const TemperingCall& call, int64_t begin, int64_t end, void* scratch,
              const Use& use) {
  for (int64_t r = begin; r < end; ++r) {
    const T* likelihood = static_cast<const T*>(call.log_likelihood) + r * call.likelihood_stride;
    if (call.log_weights == nullptr) {
      use(r, gather_equal(likelihood, call.particles, static_cast<WeightOf<T>*>(scratch)));
    } else {
      const T* weights = static_cast<const T*>(call.log_weights) + r * call.weights_stride;
      use(r, gather_weighted(likelihood, weights, call.particles, static_cast<double*>(scratch)));
    }
  }
}

}  // namespace

void next_temperature_rows(const TemperingCall& call, int64_t begin, int64_t end, void* scratch) {
  dispatch_element(call.type, [&](auto zero) {
    each_row<decltype(zero)>(call, begin, end, scratch, [&](int64_t r, const auto& living) {
      const double beta = call.beta[r];
      if (call.wide) {
        static_cast<double*>(call.result)[r] = next_temperature<double>(call, beta, living);
      } else {
        static_cast<float*>(call.result)[r] = next_temperature<float>(call, beta, living);
      }
    });
  });
}

void conditional_ess_rows(const TemperingCall& call, int64_t begin, int64_t end, void* scratch) {
  dispatch_element(call.type, [&](auto zero) {
    using T = decltype(zero);
    each_row<T>(call, begin, end, scratch, [&](int64_t r, const auto& living) {
      double share = 0.0;
      if (living.count > 0) share = living.share * exp_of(log_share(living, 1.0));
      static_cast<WeightOf<T>*>(call.result)[r] =
          static_cast<WeightOf<T>>(share * static_cast<double>(call.particles));
    });
  });
}

}  // namespace winnow::CPU_CAPABILITY
