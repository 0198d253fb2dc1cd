// winnow::next_temperature and winnow::conditional_effective_sample_size on the GPU. A block of 32
// or 256 threads has a population, and runs the whole search in one launch: each step reads the
// population again, from the L1 or L2 cache where it fits, and reduces two sums that every thread
// receives, so that all of them take the same next step.
#include <optional>

#include "common/device.h"
#include "resampling/temperature_search.h"
#include "resampling/tempering_arguments.h"

namespace winnow {
namespace {

constexpr int64_t kWarpParticles = 1024;  // up to this a single warp saves the barriers
constexpr double kNone = -std::numeric_limits<double>::infinity();
constexpr double kInfinite = std::numeric_limits<double>::infinity();

struct Math {
  WINNOW_DEVICE static double log(double x) { return ::log(x); }
  WINNOW_DEVICE static double sqrt(double x) { return ::sqrt(x); }
};

struct Pair {
  double a;
  double b;
};
struct AddPairs {
  WINNOW_DEVICE Pair operator()(const Pair& x, const Pair& y) const {
    return {x.a + y.a, x.b + y.b};
  }
};
struct LargerPairs {
  WINNOW_DEVICE Pair operator()(const Pair& x, const Pair& y) const {
    return {x.a > y.a ? x.a : y.a, x.b > y.b ? x.b : y.b};
  }
};

// One population and its block. NaN counts as -inf, infinite ones share what there is.
template <typename T, int kThreads>
struct Population {
  Global<const T> likelihood;
  Global<const T> weights;  // read where `weighted`
  bool weighted;
  int64_t particles;
  Shared<Pair> pairs;
  double top_weight;
  double top;  // of the likelihoods that have weight

  WINNOW_DEVICE double weight(int64_t i) const {
    if (!weighted) return 0.0;
    const double a = static_cast<double>(static_cast<T>(weights[i]));
    if (top_weight == kInfinite) return a == kInfinite ? 0.0 : kNone;
    return a > kNone ? a - top_weight : kNone;
  }
  // Relative to the largest; -inf for a particle without weight or likelihood.
  WINNOW_DEVICE double relative(int64_t i) const {
    const double l = static_cast<double>(static_cast<T>(likelihood[i]));
    if (!(weight(i) > kNone)) return kNone;
    if (top == kInfinite) return l == kInfinite ? 0.0 : kNone;
    return l > kNone ? l - top : kNone;
  }
  template <typename Combine, typename Term>
  WINNOW_DEVICE Pair reduce(Pair start, const Combine& combine, const Term& term) const {
    for (int64_t i = thread_index(); i < particles; i += kThreads) start = combine(start, term(i));
    return block_reduce<kThreads>(start, pairs, combine);
  }

  WINNOW_DEVICE void find_tops() {
    top_weight = 0.0;
    top = kInfinite;
    if (weighted) {
      top_weight = reduce({kNone, kNone}, LargerPairs{}, [&](int64_t i) -> Pair {
                     const double a = static_cast<double>(static_cast<T>(weights[i]));
                     return {a > kNone ? a : kNone, kNone};
                   }).a;
    }
    top = reduce({kNone, kNone}, LargerPairs{}, [&](int64_t i) -> Pair {
            const double l = static_cast<double>(static_cast<T>(likelihood[i]));
            return {weight(i) > kNone && l > kNone ? l : kNone, kNone};
          }).a;
  }
  // Sums of W over the living and over all.
  WINNOW_DEVICE Pair masses(double top_living) const {
    return reduce({0.0, 0.0}, AddPairs{}, [&](int64_t i) -> Pair {
      const double a = weight(i);
      const bool lives = relative(i) > kNone;
      return {lives ? exp(a - top_living) : 0.0, a > kNone ? exp(a) : 0.0};
    });
  }
  // log of sum W v and sum W v^2 over the living, v = exp(d l).
  WINNOW_DEVICE Pair log_sums(double d) const {
    Pair tops = {0.0, 0.0};  // of equal weights
    if (weighted) {
      tops = reduce({kNone, kNone}, LargerPairs{}, [&](int64_t i) -> Pair {
        const double u = relative(i);
        if (!(u > kNone)) return {kNone, kNone};
        const double a = weight(i);
        return {a + d * u, a + 2.0 * d * u};
      });
    }
    const Pair sums = reduce({0.0, 0.0}, AddPairs{}, [&](int64_t i) -> Pair {
      const double u = relative(i);
      if (!(u > kNone)) return {0.0, 0.0};
      const double a = weight(i);
      return {exp(a + d * u - tops.a), exp(a + 2.0 * d * u - tops.b)};
    });
    return {tops.a + log(sums.a), tops.b + log(sums.b)};
  }
};

// What the search asks of a population: who is left of it, and how far apart they are.
struct Living {
  bool any;
  double share;
  double log_mass;
  double range;
};

template <typename T, int kThreads>
WINNOW_DEVICE Living living_of(const Population<T, kThreads>& population) {
  if (population.top == kNone) return {false, 0.0, 0.0, 0.0};
  const Pair most = population.reduce({kNone, 0.0}, LargerPairs{}, [&](int64_t i) -> Pair {
    const double u = population.relative(i);
    if (!(u > kNone)) return {kNone, 0.0};
    return {population.weight(i), -u};
  });
  const Pair masses = population.masses(most.a);
  const double share = masses.a * exp(most.a) / masses.b;
  return {true, share < 1.0 ? share : 1.0, most.a + log(masses.a), most.b};
}

template <typename T, int kThreads>
struct LogShare {
  const Population<T, kThreads>& population;
  double log_mass;

  WINNOW_DEVICE double operator()(double d) const {
    const Pair sums = population.log_sums(d);
    return 2.0 * sums.a - log_mass - sums.b;
  }
};

template <typename T>
struct Call {
  Global<const T> likelihood;
  Global<const T> weights;
  bool weighted;
  int64_t likelihood_stride;
  int64_t weights_stride;
  int64_t particles;
  double target;
  double max_beta;
};

template <typename T, int kThreads>
WINNOW_DEVICE Population<T, kThreads> population_of(const Call<T>& call, Shared<Pair> pairs) {
  const int64_t row = block_index();
  Population<T, kThreads> population = {call.likelihood + row * call.likelihood_stride,
                                        call.weights + row * call.weights_stride,
                                        call.weighted,
                                        call.particles,
                                        pairs,
                                        0.0,
                                        0.0};
  population.find_tops();
  return population;
}

template <typename T, typename Real, int kThreads>
WINNOW_KERNEL(kThreads)
search_temperature(Call<T> call, Global<const Real> betas, Global<Real> result) {
  WINNOW_SHARED(Pair, pairs, (kThreads + kWarp - 1) / kWarp);
  const auto population = population_of<T, kThreads>(call, Shared<Pair>(pairs));
  const int64_t row = block_index();
  const Real start = betas[row];
  const double beta = static_cast<double>(start);
  const double limit = call.max_beta - beta;
  const Living living = living_of(population);
  bool reached = true;
  double step = limit;
  if (limit > 0.0 && living.any) {
    const double tolerance = sizeof(Real) == 8 ? 0x1p-46 : 0x1p-23;
    step = largest_step<Math>(limit, living.range, level_among_living(call.target, living.share),
                              tolerance, LogShare<T, kThreads>{population, living.log_mass});
    reached = step >= limit;
  }
  if (thread_index() == 0) {
    result[row] = next_in_schedule<Real>(beta, step, call.max_beta, reached);
  }
}

template <typename T, typename Real, int kThreads>
WINNOW_KERNEL(kThreads)
conditional_size(Call<T> call, Global<Real> result) {
  WINNOW_SHARED(Pair, pairs, (kThreads + kWarp - 1) / kWarp);
  const auto population = population_of<T, kThreads>(call, Shared<Pair>(pairs));
  const Living living = living_of(population);
  double share = 0.0;
  if (living.any) {
    share = living.share * exp(LogShare<T, kThreads>{population, living.log_mass}(1.0));
  }
  if (thread_index() == 0) {
    result[block_index()] = static_cast<Real>(share * static_cast<double>(call.particles));
  }
}

// ---- launchers ----

template <typename T>
Call<T> call_of(const Rows& likelihood, const Rows& weights, bool weighted) {
  return {global<const T>(likelihood.tensor),
          global<const T>(weights.tensor),
          weighted,
          likelihood.stride,
          weights.stride,
          likelihood.length,
          1.0,
          0.0};
}

Tensor next_temperature_cuda(const Tensor& log_likelihood, const Tensor& beta, double target_ess,
                             double max_beta, std::optional<Tensor> log_weights) {
  check_tempering(log_likelihood, beta, target_ess, max_beta, log_weights, check_device);
  const ScalarType dtype = beta.scalar_type();
  const Stream stream(log_likelihood);
  const Rows rows = as_rows(log_likelihood);
  const Rows weights = log_weights.has_value() ? as_rows(*log_weights) : rows;
  const Tensor start = torch::stable::contiguous(beta);
  Tensor result = empty(shape(beta), dtype, log_likelihood);
  dispatch_floating(log_likelihood, [&](auto zero) {
    using T = decltype(zero);
    Call<T> call = call_of<T>(rows, weights, log_weights.has_value());
    call.target = target_ess;
    call.max_beta = max_beta;
    const auto run = [&](auto real) {
      using Real = decltype(real);
      const bool small = rows.length <= kWarpParticles;
      launch("next_temperature",
             small ? search_temperature<T, Real, kWarp> : search_temperature<T, Real, 256>,
             {rows.count}, small ? kWarp : 256, stream, call, global<const Real>(start),
             global<Real>(result));
    };
    if (dtype == ScalarType::Double) {
      run(double{});
    } else {
      run(float{});
    }
  });
  return result;
}

Tensor conditional_effective_sample_size_cuda(const Tensor& log_weights,
                                              const Tensor& log_increments) {
  check_populations("log_weights", log_weights, check_device);
  check_same("log_increments", log_increments, "log_weights", log_weights, check_device);
  const Stream stream(log_weights);
  const Rows rows = as_rows(log_increments);
  const Rows weights = as_rows(log_weights);
  Tensor result = empty(leading_shape(log_weights), statistics_dtype(log_weights), log_weights);
  dispatch_floating(log_weights, [&](auto zero) {
    using T = decltype(zero);
    using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
    const bool small = rows.length <= kWarpParticles;
    launch("conditional_effective_sample_size",
           small ? conditional_size<T, Real, kWarp> : conditional_size<T, Real, 256>, {rows.count},
           small ? kWarp : 256, stream, call_of<T>(rows, weights, true), global<Real>(result));
  });
  return result;
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("next_temperature", TORCH_BOX(&winnow::next_temperature_cuda));
  m.impl("conditional_effective_sample_size",
         TORCH_BOX(&winnow::conditional_effective_sample_size_cuda));
}
