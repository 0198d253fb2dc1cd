// Conditional Poisson sampling on the GPU: the dynamic programme of conditional_poisson.h, whose
// particles come one after another and whose counts 0 to k are the threads of a block. Everything
// but the sums over particles is done in the order of the CPU.
#pragma once

#include "resampling/perturbed_population.cuh"
#include "resampling/resample_weigh.cuh"

namespace winnow {
namespace {

// Particles of a row of the programme that is kept; those between are made again.
constexpr int64_t rows_between(int64_t particles) {
  int64_t root = 1;
  while (root * root < particles) ++root;
  return root;
}

// Scratch of one population, in doubles: log weights, coins, rows.
constexpr int64_t coin_scratch(int64_t particles, int64_t k) {
  return 3 * particles + (2 * rows_between(particles) + 6) * (k + 1);
}

struct CoinLaunch {
  SampleLaunch sample;
  bool every;              // inclusion probabilities of all particles, and no sample
  Global<int64_t> places;  // (blocks, K): the particles that have weight
  Global<double> memory;   // (blocks, coin_scratch)
  int64_t memory_stride;
  int64_t blocks;  // each has every so-manieth population
};

struct Coins {
  const PerturbedPopulation& population;
  int64_t n;
  int64_t k;  // 0 < k < n
  Global<double> log_weight;
  Global<double> head;  // p
  Global<double> tail;  // 1 - p
  Global<double> rows;

  WINNOW_DEVICE Global<double> row(int64_t r) const { return rows + r * (k + 1); }

  // How many heads coins p = c w / (1 + c w) show on average; c times the kth weight is e^shift.
  WINNOW_DEVICE double expected(double kth, double shift) const {
    return population.reduce(n, 0.0, Sum{}, [&](int64_t i) {
      const double x = log_weight[i];
      const double y = x - kth + shift;
      const double small = exp_weight(y < 0.0 ? y : -y);
      return (y < 0.0 ? small : 1.0) / (1.0 + small);
    });
  }

  WINNOW_DEVICE void toss(double kth) const {
    const auto aim = static_cast<double>(k);
    double low = -log_number(static_cast<double>(n - k + 1));
    double high = log_number(4.0 * aim);
    double shift = high;
    for (int step = 0; step < 40; ++step) {
      shift = 0.5 * (low + high);
      const double heads = expected(kth, shift);
      if (heads > aim - 0.25 && heads < aim + 0.25) break;
      (heads < aim ? low : high) = shift;
    }
    for (int64_t i = thread_index(); i < n; i += kThreads) {
      const double x = log_weight[i];
      const double y = x - kth + shift;
      const double small = exp_weight(y < 0.0 ? y : -y);
      const double near = 1.0 / (1.0 + small);
      head[i] = y < 0.0 ? small * near : near;
      tail[i] = y < 0.0 ? near : small * near;
    }
    block_sync();
  }

  // P(m heads among the particles from i on), from those after it.
  WINNOW_DEVICE void tail_step(int64_t i, Global<const double> after, Global<double> to) const {
    const double p = head[i];
    const double q = tail[i];
    for (int64_t m = thread_index(); m <= k; m += kThreads) {
      const double same = after[m];
      double fewer = 0.0;
      if (m > 0) fewer = after[m - 1];
      to[m] = q * same + p * fewer;
    }
    block_sync();
  }

  // P(k - 1 - m heads up to particle i) at m, from those before it; nothing at k.
  WINNOW_DEVICE void head_step(int64_t i, Global<const double> before, Global<double> to) const {
    const double p = head[i];
    const double q = tail[i];
    for (int64_t m = thread_index(); m < k; m += kThreads) {
      const double same = before[m];
      const double more = before[m + 1];
      to[m] = q * same + p * more;
    }
    block_sync();
  }

  // visit(i, tail_i, tail_{i+1}, inclusion) for every particle in turn, until it returns false.
  template <typename Visit>
  WINNOW_DEVICE void walk(const Visit& visit) const {
    const int64_t root = rows_between(n);
    const int64_t kept = ceil_div(n, root);  // row b is tail_{b root}; the last one is tail_n
    const int64_t spare = kept + 1;          // root + 1 rows of one block
    Global<double> heads = row(spare + root + 1);
    Global<double> next_heads = row(spare + root + 2);
    for (int64_t m = thread_index(); m <= k; m += kThreads) {
      row(kept)[m] = m == 0 ? 1.0 : 0.0;
      heads[m] = m == k - 1 ? 1.0 : 0.0;
      next_heads[m] = 0.0;
    }
    block_sync();
    Global<const double> after = row(kept);
    for (int64_t i = n; i-- > 0;) {
      const Global<double> here = row(i % root == 0 ? i / root : spare + i % 2);
      tail_step(i, after, here);
      after = here;
    }
    const double all = row(0)[k];
    for (int64_t b = 0; b < kept; ++b) {
      const int64_t first = b * root;
      const int64_t end = first + root < n ? first + root : n;
      const auto in_block = [&](int64_t i) {
        return row(i == first ? b : i == end ? b + 1 : spare + i - first);
      };
      for (int64_t i = end; i-- > first + 1;) tail_step(i, in_block(i + 1), in_block(i));
      for (int64_t i = first; i < end; ++i) {
        const Global<const double> behind = in_block(i + 1);
        const auto inclusion = [&] {
          const double p = head[i];
          const double both = population.reduce(k, 0.0, Sum{}, [&](int64_t m) {
            const double before = heads[m];
            const double beyond = behind[m];
            return before * beyond;
          });
          const double share = p * both / all;
          return share < 1.0 ? share : 1.0;
        };
        if (!visit(i, Global<const double>(in_block(i)), behind, inclusion)) return;
        head_step(i, heads, next_heads);
        const Global<double> other = heads;
        heads = next_heads;
        next_heads = other;
      }
    }
  }
};

// The j-th of a sample; -1 is nobody.
WINNOW_DEVICE void write_pick(const PerturbedPopulation& population, int64_t j, int64_t index,
                              double log_total, double log_inclusion) {
  const SampleLaunch& call = population.call;
  const int64_t at = population.row * call.k + j;
  call.indices[at] = index;
  call.inclusion.store(at, index < 0 ? 0.0 : exp(log_inclusion));
  call.weights.store(at, index < 0 ? 0.0 : exp(population(index) - log_total - log_inclusion));
}

WINNOW_DEVICE void sample_coins(const CoinLaunch& launch, const PerturbedPopulation& population,
                                Shared<int32_t> counts, Shared<uint32_t> histogram) {
  const SampleLaunch& call = population.call;
  const int64_t row = population.row;
  const bool any = population.top > kNone;
  const Global<int64_t> places = launch.places + block_index() * call.particles;
  const Global<double> memory = launch.memory + block_index() * launch.memory_stride;
  int64_t n = 0;
  for (int64_t first = 0; first < call.particles; first += kThreads) {
    const int64_t i = first + thread_index();
    const double x = any && i < call.particles ? population(i) : kNone;
    int32_t here;
    const int64_t place = n + block_scan<kThreads>(x > kNone ? 1 : 0, counts, &here);
    if (x > kNone) {
      places[place] = i;
      memory[place] = x;
    }
    n += here;
  }
  block_sync();
  const bool all = n <= call.k;
  const double log_total = log(population.reduce(n, 0.0, Sum{}, [&](int64_t i) {
    const double x = memory[i];
    return exp_weight(x);
  }));
  if (launch.every) {
    for (int64_t i = thread_index(); i < call.particles; i += kThreads) {
      const bool certain = all && any && population(i) > kNone;
      call.inclusion.store(row * call.particles + i, certain ? 1.0 : 0.0);
    }
    block_sync();
  }
  if (all || call.k == 0) {
    for (int64_t j = thread_index(); j < call.k && !launch.every; j += kThreads) {
      int64_t index = -1;
      if (j < n) index = places[j];
      write_pick(population, j, index, log_total, 0.0);
    }
    return;
  }
  const double kth = key_of(kth_largest(memory, n, call.k, histogram));
  const Coins coins = {population,
                       n,
                       call.k,
                       memory,
                       memory + call.particles,
                       memory + 2 * call.particles,
                       memory + 3 * call.particles};
  coins.toss(kth);
  int64_t missing = call.k;
  coins.walk([&](int64_t i, Global<const double> here, Global<const double> behind,
                 const auto& inclusion) {
    const int64_t place = places[i];
    if (launch.every) {
      const double share = inclusion();
      if (thread_index() == 0) call.inclusion.store(row * call.particles + place, share);
      return true;
    }
    // A state of probability 0 is entered by rounding at most: then whoever is left.
    const double possible = here[missing];
    const double p = coins.head[i];
    const double taken_after = behind[missing - 1];
    const bool taken = possible > 0.0 ? population.open_uniform(place) * possible < p * taken_after
                                      : n - i <= missing;
    if (taken) {
      const double log_inclusion = log(inclusion());
      if (thread_index() == 0) {
        write_pick(population, call.k - missing, place, log_total, log_inclusion);
      }
      --missing;
    }
    return missing > 0;
  });
  for (int64_t j = call.k - missing + thread_index(); j < call.k && !launch.every; j += kThreads) {
    write_pick(population, j, -1, log_total, 0.0);
  }
}

WINNOW_KERNEL(kThreads)
conditional_poisson(CoinLaunch call) {
  WINNOW_SHARED(double, scratch, kWarps);
  WINNOW_SHARED(int32_t, counts, kWarps);
  WINNOW_SHARED(uint32_t, histogram, kThreads);
  for (int64_t row = block_index(); row < call.sample.rows; row += call.blocks) {
    PerturbedPopulation population = {call.sample, row, Shared<double>(scratch), kInfinite};
    population.find_top();
    sample_coins(call, population, Shared<int32_t>(counts), Shared<uint32_t>(histogram));
    block_sync();
  }
}

}  // namespace
}  // namespace winnow
