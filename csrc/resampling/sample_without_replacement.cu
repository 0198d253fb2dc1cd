// winnow::sample_without_replacement and winnow::inclusion_probabilities on the GPU: a block has a
// population. Gumbel top-k and Pareto: keys are drawn once into memory; the k-th largest is found
// by eight passes over their bytes, and what lies above it leaves in the order of indices. Gumbel's
// order, by key, counts for each of the k how many are larger. conditional_poisson.cuh has the
// third.
#include <optional>
#include <string>
#include <tuple>

#include "resampling/conditional_poisson.cuh"
#include "resampling/sample_arguments.h"

namespace winnow {
namespace {

// The scale log c at which sum min(1, c w) = k; those that reach 1 are certain, and leaving them
// out raises it for the others.
WINNOW_DEVICE double log_scale(const PerturbedPopulation& population, int64_t k) {
  double scale = kInfinite;
  double bound = kInfinite;
  for (int64_t round = 0; round <= k; ++round) {
    const double certain = population.reduce(
        0.0, Sum{}, [&](int64_t i) { return population(i) >= bound ? 1.0 : 0.0; });
    const double top = population.reduce(kNone, Larger{}, [&](int64_t i) {
      const double x = population(i);
      return x < bound ? x : kNone;
    });
    if (certain >= static_cast<double>(k) || top == kNone) break;
    const double sum = population.reduce(0.0, Sum{}, [&](int64_t i) {
      const double x = population(i);
      return x < bound ? exp(x - top) : 0.0;
    });
    scale = log((static_cast<double>(k) - certain) / sum) - top;
    if (top + scale < 0.0) break;
    bound = -scale;
  }
  return scale;
}

WINNOW_KERNEL(kThreads)
sample_populations(SampleLaunch call) {
  WINNOW_SHARED(double, scratch, kWarps);
  WINNOW_SHARED(int32_t, places, kWarps);
  WINNOW_SHARED(uint32_t, histogram, kThreads);
  const int64_t row = block_index();
  const int64_t n = call.particles;
  const int64_t k = call.k;
  PerturbedPopulation population = {call, row, Shared<double>(scratch), kInfinite};
  population.find_top();
  const bool any = population.top > kNone;
  const auto positive = static_cast<int64_t>(population.reduce(
      0.0, Sum{}, [&](int64_t i) { return any && population(i) > kNone ? 1.0 : 0.0; }));
  const double total =
      population.reduce(0.0, Sum{}, [&](int64_t i) { return any ? exp(population(i)) : 0.0; });
  const bool all = positive <= k;
  double scale = 0.0;
  double variance = 1.0;
  if (!all && !call.gumbel) {
    scale = log_scale(population, k);
    const double sum = population.reduce(0.0, Sum{}, [&](int64_t i) {
      const double x = population(i) + scale;
      return x < 0.0 ? exp(x) * (1.0 - exp(x)) : 0.0;
    });
    if (sum > 1.0) variance = sum;
  }

  const auto keys = call.keys + row * n;
  for (int64_t i = thread_index(); i < n; i += kThreads) {
    const double u = population.open_uniform(i);
    const double x = any ? population(i) : kNone;
    double key = kNone;
    if (x > kNone && call.gumbel) {
      key = x - log(-log(u));
    } else if (x > kNone && !all) {
      const double target = exp(x + scale);
      const double rest = 1.0 - target > 0x1p-53 ? 1.0 - target : 0x1p-53;
      const double bend = target * rest * (target - 0.5) / (variance * variance);
      key = x + scale < 0.0 ? x + scale - log(rest) - log(u) + log(1.0 - u) - bend : kInfinite;
    } else if (x > kNone) {
      key = 0.0;
    }
    keys[i] = key;
  }
  block_sync();

  // Those above the k-th largest key, and as many of its equals as are missing, by index.
  const uint64_t least =
      all ? ordered(kNone) + 1 : kth_largest(keys, n, k, Shared<uint32_t>(histogram));
  const auto above = static_cast<int64_t>(population.reduce(0.0, Sum{}, [&](int64_t i) {
    const double key = keys[i];
    return ordered(key) > least ? 1.0 : 0.0;
  }));
  const auto picked = call.picked + row * k;
  int64_t equal = k - above;
  int64_t count = 0;
  double next = kNone;  // the largest key that is left
  for (int64_t first = 0; first < n; first += kThreads) {
    const int64_t i = first + thread_index();
    double key = kNone;
    if (i < n) key = keys[i];
    const uint64_t word = ordered(key);
    int32_t ties = 0;
    const int32_t tie = !all && i < n && word == least ? 1 : 0;
    const int32_t before = block_scan<kThreads>(tie, Shared<int32_t>(places), &ties);
    const bool taken = i < n && (all ? word >= least : word > least || (tie && before < equal));
    int32_t taken_here = 0;
    const int32_t place = block_scan<kThreads>(taken ? 1 : 0, Shared<int32_t>(places), &taken_here);
    if (taken) picked[count + place] = i;
    if (!taken && key > next) next = key;
    equal -= ties < equal ? ties : equal;
    count += taken_here;
  }
  next = block_reduce<kThreads>(next, Shared<double>(scratch), Larger{});
  block_sync();

  for (int64_t j = thread_index(); j < k; j += kThreads) {
    int64_t index = -1;
    int64_t place = j;
    double log_inclusion = 0.0;
    double weight = 0.0;
    if (j < count) {
      index = picked[j];
      const double x = population(index);
      if (call.gumbel) {
        const double key = keys[index];
        place = 0;
        for (int64_t other = 0; other < count; ++other) {
          const int64_t rival = picked[other];
          const double rival_key = keys[rival];
          place += rival_key > key || (rival_key == key && other < j) ? 1 : 0;
        }
      }
      if (!all && call.gumbel) {
        const double rate = exp(x - next);
        log_inclusion = rate < 1e-5 ? x - next - 0.5 * rate : log(-expm1(-rate));
      } else if (!all) {
        log_inclusion = x + scale < 0.0 ? x + scale : 0.0;
      }
      weight = exp(x - log(total) - log_inclusion);
    }
    const int64_t at = row * k + place;
    call.indices[at] = index;
    call.inclusion.store(at, index < 0 ? 0.0 : exp(log_inclusion));
    call.weights.store(at, weight);
  }
}

// ---- launchers ----

SampleLaunch sample_launch(const Tensor& log_weights, const Rows& rows, int64_t k) {
  SampleLaunch call = {};
  call.log_weights = numbers(rows.tensor);
  call.stride = rows.stride;
  call.rows = rows.count;
  call.particles = log_weights.size(log_weights.dim() - 1);
  call.k = k;
  return call;
}

// As many populations at a time as there are blocks on the GPU, or as fit a quarter of a gigabyte.
void run_coins(const SampleLaunch& sample, bool every, const Tensor& like, const Stream& stream) {
  constexpr int64_t kDoubles = int64_t{1} << 25;
  const char* name = every ? "inclusion_probabilities" : "sample_without_replacement";
  CoinLaunch call = {};
  call.sample = sample;
  call.every = every;
  call.memory_stride = coin_scratch(sample.particles, sample.k);
  const int64_t fit = kDoubles / call.memory_stride;
  call.blocks = blocks_at_once(name, conditional_poisson, kThreads);
  if (call.blocks > fit) call.blocks = fit > 1 ? fit : 1;
  if (call.blocks > sample.rows) call.blocks = sample.rows;
  const Tensor places = empty({call.blocks, sample.particles}, ScalarType::Long, like);
  const Tensor memory = empty({call.blocks, call.memory_stride}, ScalarType::Double, like);
  call.places = global<int64_t>(places);
  call.memory = global<double>(memory);
  launch(name, conditional_poisson, {call.blocks}, kThreads, stream, call);
}

Sample sample_without_replacement_cuda(const Tensor& log_weights, int64_t k, std::string design,
                                       int64_t seed, std::optional<Tensor> seed_tensor) {
  check_sample(log_weights, k, check_device);
  const Design kind = design_of(design);
  const Stream stream(log_weights);
  const Rows rows = as_rows(log_weights);
  const Sample sample = empty_sample(log_weights, k);
  if (k == 0) return sample;
  const auto& [indices, inclusion, weights] = sample;
  SampleLaunch call = sample_launch(log_weights, rows, k);
  call.gumbel = kind == Design::kGumbelTopK;
  if (seed_tensor.has_value()) call.seed = seed_of(*seed_tensor);
  call.seed_given = seed_tensor.has_value();
  call.seed_number = static_cast<uint64_t>(seed);
  call.indices = global<int64_t>(indices);
  call.inclusion = reals(inclusion);
  call.weights = reals(weights);
  if (kind == Design::kConditionalPoisson) {
    run_coins(call, false, log_weights, stream);
    return sample;
  }
  const Tensor keys = empty({rows.count, call.particles}, ScalarType::Double, log_weights);
  const Tensor picked = empty({rows.count, k}, ScalarType::Long, log_weights);
  call.keys = global<double>(keys);
  call.picked = global<int64_t>(picked);
  launch("sample_without_replacement", sample_populations, {rows.count}, kThreads, stream, call);
  return sample;
}

Tensor inclusion_probabilities_cuda(const Tensor& log_weights, int64_t k) {
  check_sample(log_weights, k, check_device);
  const Stream stream(log_weights);
  const Rows rows = as_rows(log_weights);
  const Tensor inclusion = empty(shape(log_weights), statistics_dtype(log_weights), log_weights);
  SampleLaunch call = sample_launch(log_weights, rows, k);
  call.inclusion = reals(inclusion);
  run_coins(call, true, log_weights, stream);
  return inclusion;
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("sample_without_replacement", TORCH_BOX(&winnow::sample_without_replacement_cuda));
  m.impl("inclusion_probabilities", TORCH_BOX(&winnow::inclusion_probabilities_cuda));
}
