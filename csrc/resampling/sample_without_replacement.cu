// winnow::sample_without_replacement on the GPU, Gumbel top-k and Pareto: a block has a population.
// Keys are drawn once into memory; the k-th largest is found by eight passes over their bytes, and
// what lies above it leaves in the order of indices. Gumbel's order, by key, counts for each of the
// k how many are larger. Conditional Poisson sampling is sequential and runs on the CPU.
#include <optional>
#include <string>
#include <tuple>

#include "common/device.h"
#include "common/philox.h"

namespace winnow {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr double kNone = -std::numeric_limits<double>::infinity();
constexpr double kInfinite = std::numeric_limits<double>::infinity();

template <typename T, typename Real>
struct Call {
  Global<const T> log_weights;
  int64_t stride;
  int64_t particles;
  int64_t k;
  bool gumbel;
  Seed seed;
  bool seed_given;
  uint64_t seed_number;
  Global<double> keys;     // (rows, K)
  Global<int64_t> picked;  // (rows, k)
  Global<int64_t> indices;
  Global<Real> inclusion;
  Global<Real> weights;
};

struct Sum {
  WINNOW_DEVICE double operator()(double a, double b) const { return a + b; }
};
struct Larger {
  WINNOW_DEVICE double operator()(double a, double b) const { return a > b ? a : b; }
};

// Keys as integers of the same order.
WINNOW_DEVICE uint64_t ordered(double key) {
  uint64_t bits;
  memcpy(&bits, &key, sizeof bits);
  return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}

template <typename T>
struct Population {
  Global<const T> log_weights;
  int64_t particles;
  Shared<double> scratch;
  double top;

  // Relative to the largest, -inf without weight; infinite ones are all there is.
  WINNOW_DEVICE double operator()(int64_t i) const {
    const double x = static_cast<double>(static_cast<T>(log_weights[i]));
    if (top == kInfinite) return x == kInfinite ? 0.0 : kNone;
    return x > kNone ? x - top : kNone;
  }
  template <typename Combine, typename Term>
  WINNOW_DEVICE double reduce(double start, const Combine& combine, const Term& term) const {
    for (int64_t i = thread_index(); i < particles; i += kThreads) start = combine(start, term(i));
    return block_reduce<kThreads>(start, scratch, combine);
  }
};

// The scale log c at which sum min(1, c w) = k; those that reach 1 are certain, and leaving them
// out raises it for the others.
template <typename T>
WINNOW_DEVICE double log_scale(const Population<T>& population, int64_t k) {
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

// The k-th largest of the keys, 0 < k <= K.
WINNOW_DEVICE uint64_t kth_largest(Global<const double> keys, int64_t particles, int64_t k,
                                   Shared<uint32_t> histogram) {
  uint64_t prefix = 0;
  int64_t rank = k;
  for (int shift = 56; shift >= 0; shift -= 8) {
    histogram[thread_index()] = 0;  // kThreads bins
    block_sync();
    for (int64_t i = thread_index(); i < particles; i += kThreads) {
      const double key = keys[i];
      const uint64_t word = ordered(key);
      const bool same = shift == 56 || (word ^ prefix) >> (shift + 8) == 0;
      if (same) atomic_add(histogram + static_cast<int64_t>(word >> shift & 255), 1u);
    }
    block_sync();
    for (int bin = 255; bin >= 0; --bin) {
      const uint32_t count = histogram[bin];
      if (rank <= static_cast<int64_t>(count)) {
        prefix |= static_cast<uint64_t>(bin) << shift;
        break;
      }
      rank -= count;
    }
    block_sync();
  }
  return prefix;
}

template <typename T, typename Real>
WINNOW_KERNEL(kThreads)
sample_populations(Call<T, Real> call) {
  WINNOW_SHARED(double, scratch, kWarps);
  WINNOW_SHARED(int32_t, places, kWarps);
  WINNOW_SHARED(uint32_t, histogram, kThreads);
  const int64_t row = block_index();
  const int64_t n = call.particles;
  const int64_t k = call.k;
  Population<T> population = {call.log_weights + row * call.stride, n, Shared<double>(scratch),
                              kInfinite};
  population.top = population.reduce(kNone, Larger{}, [&](int64_t i) {
    const double x = static_cast<double>(static_cast<T>(population.log_weights[i]));
    return x > kNone ? x : kNone;
  });
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

  const uint64_t seed = call.seed_given ? call.seed.get() : call.seed_number;
  const auto keys = call.keys + row * n;
  for (int64_t i = thread_index(); i < n; i += kThreads) {
    const uint64_t bits =
        philox_bits(seed, static_cast<uint64_t>(row), static_cast<uint64_t>(i)) >> 12;
    const double u = (static_cast<double>(bits) + 0.5) * 0x1p-52;
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
    call.indices[row * k + place] = index;
    call.inclusion[row * k + place] = static_cast<Real>(index < 0 ? 0.0 : exp(log_inclusion));
    call.weights[row * k + place] = static_cast<Real>(weight);
  }
}

// ---- launchers ----

std::tuple<Tensor, Tensor, Tensor> sample_without_replacement_cuda(
    const Tensor& log_weights, int64_t k, std::string design, int64_t seed,
    std::optional<Tensor> seed_tensor) {
  check_device("log_weights", log_weights);
  check_floating("log_weights", log_weights);
  WINNOW_CHECK(log_weights.dim() >= 1, "log_weights: expected (..., K), got a scalar");
  WINNOW_CHECK(design == "gumbel_topk" || design == "pareto",
               "design: expected gumbel_topk or pareto on a GPU (conditional_poisson runs on the "
               "CPU), got '",
               design, "'");
  const int64_t particles = log_weights.size(log_weights.dim() - 1);
  WINNOW_CHECK(k >= 0 && k <= particles, "k: expected 0 to K = ", particles, ", got ", k);
  const Stream stream(log_weights);
  const Rows rows = as_rows(log_weights);
  Shape sizes = leading_shape(log_weights);
  sizes.push_back(k);
  const Tensor indices = empty(sizes, ScalarType::Long, log_weights);
  const Tensor inclusion = empty(sizes, statistics_dtype(log_weights), log_weights);
  const Tensor weights = empty(sizes, statistics_dtype(log_weights), log_weights);
  if (k == 0) return {indices, inclusion, weights};
  const Tensor keys = empty({rows.count, particles}, ScalarType::Double, log_weights);
  const Tensor picked = empty({rows.count, k}, ScalarType::Long, log_weights);
  dispatch_floating(log_weights, [&](auto zero) {
    using T = decltype(zero);
    using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
    Call<T, Real> call = {};
    call.log_weights = global<const T>(rows.tensor);
    call.stride = rows.stride;
    call.particles = particles;
    call.k = k;
    call.gumbel = design == "gumbel_topk";
    if (seed_tensor.has_value()) call.seed = seed_of(*seed_tensor);
    call.seed_given = seed_tensor.has_value();
    call.seed_number = static_cast<uint64_t>(seed);
    call.keys = global<double>(keys);
    call.picked = global<int64_t>(picked);
    call.indices = global<int64_t>(indices);
    call.inclusion = global<Real>(inclusion);
    call.weights = global<Real>(weights);
    launch("sample_without_replacement", sample_populations<T, Real>, {rows.count}, kThreads,
           stream, call);
  });
  return {indices, inclusion, weights};
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("sample_without_replacement", TORCH_BOX(&winnow::sample_without_replacement_cuda));
}
