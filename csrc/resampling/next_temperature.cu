// winnow::next_temperature and winnow::conditional_effective_sample_size on the GPU. A block of 32
// or 256 threads has a population, and runs the whole search in one launch: each step reads the
// population again, from the L1 or L2 cache where it fits, and reduces two sums that every thread
// receives, so that all of them take the same next step.
#include <optional>

#include "resampling/numbers.cuh"
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

struct Call {
  Numbers likelihood;
  Numbers weights;
  bool weighted;
  int64_t likelihood_stride;
  int64_t weights_stride;
  int64_t particles;
  double target;
  double max_beta;
};

// One population and its block. NaN counts as -inf, infinite ones share what there is.
template <int kThreads>
struct Population {
  const Call& call;
  int64_t row;
  Shared<Pair> pairs;
  double top_weight;
  double top;  // of the likelihoods that have weight

  WINNOW_DEVICE double own_weight(int64_t i) const {
    return call.weights[row * call.weights_stride + i];
  }
  WINNOW_DEVICE double own_likelihood(int64_t i) const {
    return call.likelihood[row * call.likelihood_stride + i];
  }
  WINNOW_DEVICE double weight(int64_t i) const {
    if (!call.weighted) return 0.0;
    const double a = own_weight(i);
    if (top_weight == kInfinite) return a == kInfinite ? 0.0 : kNone;
    return a > kNone ? a - top_weight : kNone;
  }
  // Relative to the largest; -inf for a particle without weight or likelihood.
  WINNOW_DEVICE double relative(int64_t i) const {
    const double l = own_likelihood(i);
    if (!(weight(i) > kNone)) return kNone;
    if (top == kInfinite) return l == kInfinite ? 0.0 : kNone;
    return l > kNone ? l - top : kNone;
  }
  template <typename Combine, typename Term>
  WINNOW_DEVICE Pair reduce(Pair start, const Combine& combine, const Term& term) const {
    for (int64_t i = thread_index(); i < call.particles; i += kThreads) {
      start = combine(start, term(i));
    }
    return block_reduce<kThreads>(start, pairs, combine);
  }

  WINNOW_DEVICE void find_tops() {
    top_weight = 0.0;
    top = kInfinite;
    if (call.weighted) {
      top_weight = reduce({kNone, kNone}, LargerPairs{}, [&](int64_t i) -> Pair {
                     const double a = own_weight(i);
                     return {a > kNone ? a : kNone, kNone};
                   }).a;
    }
    top = reduce({kNone, kNone}, LargerPairs{}, [&](int64_t i) -> Pair {
            const double l = own_likelihood(i);
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
    if (call.weighted) {
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

template <int kThreads>
WINNOW_DEVICE Living living_of(const Population<kThreads>& population) {
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

template <int kThreads>
struct LogShare {
  const Population<kThreads>& population;
  double log_mass;

  WINNOW_DEVICE double operator()(double d) const {
    const Pair sums = population.log_sums(d);
    return 2.0 * sums.a - log_mass - sums.b;
  }
};

template <int kThreads>
WINNOW_DEVICE Population<kThreads> population_of(const Call& call, Shared<Pair> pairs) {
  Population<kThreads> population = {call, block_index(), pairs, 0.0, 0.0};
  population.find_tops();
  return population;
}

template <int kThreads>
WINNOW_KERNEL(kThreads)
search_temperature(Call call, Reals betas, Reals result) {
  WINNOW_SHARED(Pair, pairs, (kThreads + kWarp - 1) / kWarp);
  const auto population = population_of<kThreads>(call, Shared<Pair>(pairs));
  const int64_t row = block_index();
  const double beta = betas[row];
  const bool narrow = static_cast<bool>(betas.narrow);
  const double limit = call.max_beta - beta;
  const Living living = living_of(population);
  bool reached = true;
  double step = limit;
  if (limit > 0.0 && living.any) {
    const double tolerance = narrow ? 0x1p-23 : 0x1p-46;
    step = largest_step<Math>(limit, living.range, level_among_living(call.target, living.share),
                              tolerance, LogShare<kThreads>{population, living.log_mass});
    reached = step >= limit;
  }
  if (thread_index() == 0) {
    result.store(row, narrow ? static_cast<double>(
                                   next_in_schedule<float>(beta, step, call.max_beta, reached))
                             : next_in_schedule<double>(beta, step, call.max_beta, reached));
  }
}

template <int kThreads>
WINNOW_KERNEL(kThreads)
conditional_size(Call call, Reals result) {
  WINNOW_SHARED(Pair, pairs, (kThreads + kWarp - 1) / kWarp);
  const auto population = population_of<kThreads>(call, Shared<Pair>(pairs));
  const Living living = living_of(population);
  double share = 0.0;
  if (living.any) {
    share = living.share * exp(LogShare<kThreads>{population, living.log_mass}(1.0));
  }
  if (thread_index() == 0) {
    result.store(block_index(), share * static_cast<double>(call.particles));
  }
}

// ---- launchers ----

Call call_of(const Rows& likelihood, const Rows& weights, bool weighted) {
  return {numbers(likelihood.tensor),
          numbers(weights.tensor),
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
  const Stream stream(log_likelihood);
  const Rows rows = as_rows(log_likelihood);
  const Rows weights = log_weights.has_value() ? as_rows(*log_weights) : rows;
  const Tensor start = dense(beta);
  Tensor result = empty(shape(beta), beta.scalar_type(), log_likelihood);
  Call call = call_of(rows, weights, log_weights.has_value());
  call.target = target_ess;
  call.max_beta = max_beta;
  const bool small = rows.length <= kWarpParticles;
  launch("next_temperature", small ? search_temperature<kWarp> : search_temperature<256>,
         {rows.count}, small ? kWarp : 256, stream, call, reals(start), reals(result));
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
  const bool small = rows.length <= kWarpParticles;
  launch("conditional_effective_sample_size",
         small ? conditional_size<kWarp> : conditional_size<256>, {rows.count}, small ? kWarp : 256,
         stream, call_of(rows, weights, true), reals(result));
  return result;
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("next_temperature", TORCH_BOX(&winnow::next_temperature_cuda));
  m.impl("conditional_effective_sample_size",
         TORCH_BOX(&winnow::conditional_effective_sample_size_cuda));
}
