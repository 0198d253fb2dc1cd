// k of K particles without replacement, by three designs: the largest of perturbed log weights
// (Gumbel top-k), the largest of Rosen's ranking variables (Pareto), and conditional Poisson
// sampling. One or two passes over a row in double, and a heap of k; conditional_poisson.h has the
// costs of its own.
#include "resampling/sample_without_replacement_simd.h"

#include "common/dispatch_simd.h"
#include "resampling/conditional_poisson.h"
#include "resampling/picks.h"
#include "resampling/tempered.h"

namespace winnow::CPU_CAPABILITY {
namespace {

// A population: log weights relative to the largest, -inf for those without.
struct Particles {
  double* log_weight;
  int64_t n;
  int64_t positive;
  double log_total;
};

template <typename T>
Particles prepare(const T* row, int64_t n, double* memory) {
  Particles particles = {memory, n, 0, 0.0};
  to_doubles(row, n, memory);
  const double top = largest(memory, n);
  if (top == kNone) return particles;
  relative_to(top, memory, n);
  for (int64_t i = 0; i < n; ++i) particles.positive += memory[i] > kNone ? 1 : 0;
  particles.log_total = log_of(sum_of_exp(memory, n));
  return particles;
}

// Numbers in (0, 1) with 53 bits, none of them 0 or 1.
inline f64x8 open_uniforms(uint64_t seed, uint64_t row, uint64_t first) {
  u64x8 bits = philox_wide(seed, wide_word(row), count_from(first));
  for (int p = 0; p < kParts; ++p) bits.part[p] = bits.part[p] >> 12;
  return (to_double(bits) + wide(0.5)) * wide(0x1p-52);
}

inline double open_uniform(uint64_t seed, uint64_t row, uint64_t element) {
  const uint64_t bits = philox_bits(seed, row, element) >> 12;
  return (static_cast<double>(bits) + 0.5) * 0x1p-52;
}

// An output row: what is missing stays -1 with weight 0.
template <typename R>
struct Output {
  int64_t* indices;
  R* inclusion;
  R* weights;
  int64_t count = 0;

  // The weight is exp(log_share - log_inclusion): the ratio exists where both underflow.
  void add(int64_t index, double log_share, double log_inclusion) {
    const double log_weight = log_share - log_inclusion;
    indices[count] = index;
    inclusion[count] = static_cast<R>(exp_of(log_inclusion));
    weights[count++] =
        static_cast<R>(log_weight > 0.0 ? 1.0 / exp_of(-log_weight) : exp_of(log_weight));
  }
  void pad(int64_t k) {
    for (; count < k; ++count) {
      indices[count] = -1;
      inclusion[count] = 0;
      weights[count] = 0;
    }
  }
};

// 2^floor(log2 x) as a logarithm: not above log(x), for positive normal x.
f64x8 log_floor(f64x8 x) {
  f64x8 r;
  for (int p = 0; p < kParts; ++p) {
    const LongPart exponent = ((LongPart)x.part[p] >> 52) - 1023;
    const DoublePart magic = DoublePart{} + 0x1.8p52;
    r.part[p] = ((DoublePart)((LongPart)magic + exponent) - magic) * 6.93147180559945309417e-01;
  }
  return r;
}

bool any_above(f64x8 x, double bound) {
  LongPart above = {};
  for (int p = 0; p < kParts; ++p) above |= (LongPart)(x.part[p] > DoublePart{} + bound);
  int64_t lanes[kWide / kParts];
  std::memcpy(lanes, &above, sizeof lanes);
  int64_t some = 0;
  for (const int64_t lane : lanes) some |= lane;
  return some != 0;
}

// keys(first, log weights, keys) of kWide particles, or false if none of them reaches the heap;
// those without weight get none.
template <typename Keys>
void offer_all(const Particles& particles, Largest* largest, const Keys& keys) {
  for (int64_t i = 0; i < particles.n; i += kWide) {
    double key[kWide];
    if (!keys(i, load_some(particles.log_weight, i, particles.n), key)) continue;
    for (int64_t l = 0; l < kWide && i + l < particles.n; ++l) {
      if (particles.log_weight[i + l] > kNone) largest->offer(key[l], i + l);
    }
  }
}

// Log of the probability that a Gumbel variable exceeds -x: 1 - exp(-exp(x)).
double log_exceeds(double x) {
  if (x > 40.0) return 0.0;
  const double rate = x > 0.0 ? 1.0 / exp_of(-x) : exp_of(x);
  if (rate < 1e-5) return x - 0.5 * rate;  // and rate^2 / 24, which is nothing
  return log_of(1.0 - exp_of(-rate));
}

template <typename R>
void gumbel_top_k(const SampleCall& call, int64_t row, const Particles& particles, Pick* picks,
                  Output<R>* output) {
  Largest largest = {picks, call.k + 1};
  offer_all(particles, &largest, [&](int64_t first, f64x8 log_weight, double* key) {
    const f64x8 u =
        open_uniforms(call.seed, static_cast<uint64_t>(row), static_cast<uint64_t>(first));
    // -log(u) >= 1 - u, so the key is at most this: mostly no logarithm is needed.
    const f64x8 most = log_weight - log_floor(wide(1.0) - u);
    if (largest.count == largest.capacity && !any_above(most, picks[0].key - 1e-9)) return false;
    const f64x8 gumbel = wide(0.0) - log_wide(wide(0.0) - log_wide(u));
    const f64x8 perturbed = log_weight + gumbel;
    std::memcpy(key, &perturbed, sizeof perturbed);
    return true;
  });
  sort_picks<ByKey>(picks, largest.count);
  const bool all = largest.count <= call.k;
  const int64_t count = all ? largest.count : call.k;
  for (int64_t j = 0; j < count; ++j) {
    const double x = particles.log_weight[picks[j].index];
    const double inclusion = all ? 0.0 : log_exceeds(x - picks[call.k].key);
    output->add(picks[j].index, x - particles.log_total, inclusion);
  }
}

// The scale log c at which sum min(1, c w) = k. Particles that reach 1 are certain; leaving them
// out raises the scale for the others, until none is new.
double log_scale(const Particles& particles, int64_t k) {
  double scale = kInfinite;
  double bound = kInfinite;  // log weights from here on are certain
  for (int64_t round = 0; round <= k; ++round) {
    int64_t certain = 0;
    double top = kNone;
    for (int64_t i = 0; i < particles.n; ++i) {
      const double x = particles.log_weight[i];
      certain += x >= bound ? 1 : 0;
      if (x < bound && x > top) top = x;
    }
    if (certain >= k || top == kNone) break;
    double sum = 0.0;
    for (int64_t i = 0; i < particles.n; i += kWide) {
      double part[kWide];
      const f64x8 x = load_some(particles.log_weight, i, particles.n);
      std::memcpy(part, &x, sizeof x);
      for (double& y : part) y = y < bound ? y - top : kNone;
      sum += sum_wide(exp_wide(load_wide(part)));
    }
    scale = log_of(static_cast<double>(k - certain) / sum) - top;
    if (top + scale < 0.0) break;
    bound = -scale;
  }
  return scale;
}

template <typename R>
void pareto(const SampleCall& call, int64_t row, const Particles& particles, Pick* picks,
            Output<R>* output) {
  const double scale = log_scale(particles, call.k);
  // Log targets below 0, and -inf for those that are certain or have no weight.
  const auto open_targets = [&](f64x8 log_weight) {
    double log_target[kWide];
    std::memcpy(log_target, &log_weight, sizeof log_weight);
    for (double& x : log_target) x = x + scale < 0.0 ? x + scale : kNone;
    return load_wide(log_target);
  };
  double variance = 0.0;
  for (int64_t i = 0; i < particles.n; i += kWide) {
    const f64x8 target = exp_wide(open_targets(load_some(particles.log_weight, i, particles.n)));
    variance += sum_wide(target * (wide(1.0) - target));
  }
  // The correction is one of large variances.
  if (variance < 1.0) variance = 1.0;
  const f64x8 half = wide(0.5);
  const f64x8 spread = wide(1.0 / (variance * variance));
  Largest largest = {picks, call.k};
  offer_all(particles, &largest, [&](int64_t first, f64x8 log_weight, double* key) {
    const f64x8 u =
        open_uniforms(call.seed, static_cast<uint64_t>(row), static_cast<uint64_t>(first));
    const f64x8 log_target = open_targets(log_weight);
    const f64x8 target = exp_wide(log_target);
    const f64x8 rest = wide(1.0) - target;
    // Bondesson, Traat and Lundqvist (2006): inclusion probabilities nearer to their targets.
    const f64x8 bend = target * rest * (target - half) * spread;
    // One that rounds to certain has odds of 2^53, the most that a double can tell from it.
    double odds[kWide];
    std::memcpy(odds, &rest, sizeof rest);
    for (double& x : odds) x = x > 0x1p-53 ? x : 0x1p-53;
    const f64x8 v =
        log_target - log_wide(load_wide(odds)) - log_wide(u) + log_wide(wide(1.0) - u) - bend;
    std::memcpy(key, &v, sizeof v);
    double x[kWide];
    std::memcpy(x, &log_weight, sizeof log_weight);
    for (int64_t l = 0; l < kWide; ++l) key[l] = x[l] + scale < 0.0 ? key[l] : kInfinite;
    return true;
  });
  sort_picks<ByIndex>(picks, largest.count);
  for (int64_t j = 0; j < largest.count; ++j) {
    const double x = particles.log_weight[picks[j].index];
    const double inclusion = x + scale < 0.0 ? x + scale : 0.0;
    output->add(picks[j].index, x - particles.log_total, inclusion);
  }
}

// The coins of a population that has more than k particles with weight; place[i] is a coin's
// particle.
Coins coins_of(const Particles& particles, int64_t k, Pick* picks, double* memory, int64_t* place) {
  Largest largest = {picks, k};
  for (int64_t i = 0; i < particles.n; ++i) {
    if (particles.log_weight[i] > kNone) largest.offer(particles.log_weight[i], i);
  }
  int64_t n = 0;
  for (int64_t i = 0; i < particles.n; ++i) {
    if (!(particles.log_weight[i] > kNone)) continue;
    place[n] = i;
    particles.log_weight[n++] = particles.log_weight[i];
  }
  const Coins coins = {n, k, memory, memory + n, memory + 2 * n};
  make_coins(coins, particles.log_weight, picks[0].key);
  return coins;
}

template <typename R>
void conditional_poisson(const SampleCall& call, int64_t row, const Particles& particles,
                         Pick* picks, double* memory, Output<R>* output) {
  auto* place = reinterpret_cast<int64_t*>(memory);
  const Coins coins = coins_of(particles, call.k, picks, memory + call.particles, place);
  int64_t missing = call.k;
  walk(coins, [&](int64_t i, const double* here, const double* behind, const auto& inclusion) {
    const double u =
        open_uniform(call.seed, static_cast<uint64_t>(row), static_cast<uint64_t>(place[i]));
    // A state of probability 0 is entered by rounding at most: then whoever is left.
    const bool possible = here[missing] > 0.0;
    const bool taken =
        possible ? u * here[missing] < coins.head[i] * behind[missing - 1] : coins.n - i <= missing;
    if (taken) {
      output->add(place[i], particles.log_weight[i] - particles.log_total, log_of(inclusion()));
      --missing;
    }
    return missing > 0;
  });
}

template <typename T>
void sample_row(const SampleCall& call, int64_t row, double* memory) {
  using R = WeightOf<T>;
  auto* picks = reinterpret_cast<Pick*>(memory);
  double* further = memory + 2 * (call.k + 2);
  const Particles particles =
      prepare(static_cast<const T*>(call.log_weights) + row * call.stride, call.particles, further);
  further += call.particles;
  Output<R> output = {call.indices + row * call.k, static_cast<R*>(call.inclusion) + row * call.k,
                      static_cast<R*>(call.weights) + row * call.k};
  if (call.k > 0 && call.design == Design::kGumbelTopK) {
    gumbel_top_k(call, row, particles, picks, &output);
  } else if (particles.positive <= call.k) {
    for (int64_t i = 0; i < call.particles; ++i) {
      const double x = particles.log_weight[i];
      if (x > kNone) output.add(i, x - particles.log_total, 0.0);
    }
  } else if (call.k > 0 && call.design == Design::kPareto) {
    pareto(call, row, particles, picks, &output);
  } else if (call.k > 0) {
    conditional_poisson(call, row, particles, picks, further, &output);
  }
  output.pad(call.k);
}

template <typename T>
void inclusion_row(const SampleCall& call, int64_t row, double* memory) {
  using R = WeightOf<T>;
  auto* picks = reinterpret_cast<Pick*>(memory);
  double* further = memory + 2 * (call.k + 2);
  const Particles particles =
      prepare(static_cast<const T*>(call.log_weights) + row * call.stride, call.particles, further);
  R* result = static_cast<R*>(call.inclusion) + row * call.particles;
  const bool all = particles.positive <= call.k;
  for (int64_t i = 0; i < call.particles; ++i) {
    result[i] = all && particles.log_weight[i] > kNone ? 1 : 0;
  }
  if (all || call.k == 0) return;
  further += call.particles;
  auto* place = reinterpret_cast<int64_t*>(further);
  const Coins coins = coins_of(particles, call.k, picks, further + call.particles, place);
  walk(coins, [&](int64_t i, const double*, const double*, const auto& inclusion) {
    result[place[i]] = static_cast<R>(inclusion());
    return true;
  });
}

}  // namespace

void sample_rows(const SampleCall& call, int64_t begin, int64_t end, void* scratch) {
  dispatch_element(call.type, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t row = begin; row < end; ++row) {
      if (call.indices == nullptr) {
        inclusion_row<T>(call, row, static_cast<double*>(scratch));
      } else {
        sample_row<T>(call, row, static_cast<double*>(scratch));
      }
    }
  });
}

}  // namespace winnow::CPU_CAPABILITY
