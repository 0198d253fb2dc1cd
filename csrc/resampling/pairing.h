// The Srinivasan sampling process (Gerber, Chopin and Whiteley 2019): a particle has floor(M w)
// offspring, and remainders meet in pairs until each is 0 or 1. Of a pair whose sum is below one, a
// particle takes both with probability in proportion to its own; else one is completed and the
// other keeps what is over, so that either's expectation stays. Runs of kRun are paired one after
// another, then what is left of kRun runs, and so on: any order gives the same marginals, and this
// one can be split. Remainders are integers below the total T, so the last one left is exactly
// zero.
#pragma once

#include <cstdint>

#include "resampling/spread.h"
#include "resampling/work.h"

namespace winnow {
namespace {

struct Remainder {
  uint64_t rest;
  int64_t owner;
};

// The whole part of samples * weight / total; the remainder goes to `rest`.
inline int64_t whole_offspring(const Grid& grid, uint64_t weight, uint64_t* rest) {
  const auto total = static_cast<int64_t>(grid.total);
  auto whole = static_cast<int64_t>(static_cast<double>(weight) * grid.ratio);
  auto over =
      static_cast<int64_t>(grid.samples * weight - static_cast<uint64_t>(whole) * grid.total);
  for (; over >= total; over -= total) ++whole;
  for (; over < 0; over += total) --whole;
  *rest = static_cast<uint64_t>(over);
  return whole;
}

// Given that the pinned particle's remainder will be completed, whether it is now. Its remainder is
// the probability of that, so each outcome counts in proportion to the remainder that it leaves.
inline bool completed_now(uint64_t own, uint64_t other, uint64_t bits, uint64_t total) {
  const double u = static_cast<double>(static_cast<int64_t>(bits >> 11)) * 0x1p-53;
  const auto t = static_cast<double>(total);
  const double range = static_cast<double>(2 * total - own - other);
  return u * static_cast<double>(own) * range < t * static_cast<double>(total - other);
}

// `live` meets `next`; who is left is `live`. `certain` is the pinned particle if it must gain.
inline void pair_up(Remainder* live, const Remainder& next, uint64_t bits, uint64_t total,
                    int64_t certain, int64_t* offspring) {
  const uint64_t sum = live->rest + next.rest;
  const bool over = sum >= total;
  const uint64_t range = over ? 2 * total - sum : sum;
  const uint64_t share = over ? total - next.rest : live->rest;
  bool first = multiply_high(bits, range) < share;
  if (live->owner == certain) {
    first = !over || completed_now(live->rest, next.rest, bits, total);
  } else if (next.owner == certain) {
    first = over && !completed_now(next.rest, live->rest, bits, total);
  }
  offspring[first ? live->owner : next.owner] += over;
  live->owner = first == over ? next.owner : live->owner;
  live->rest = over ? sum - total : sum;
}

template <typename T>
void pair_block(const Work<T>& work, int64_t* offspring, int64_t b) {
  const Population& p = work.population;
  const Grid grid = make_grid(p.samples, p.total, 0);
  const Uniforms uniforms = uniforms_of(work.call, p);
  const int64_t certain = p.forced_rest ? p.pinned : -1;
  const int64_t end = b * kBlock + work.length(b);
  uint64_t weight[kRun];
  uint64_t bits[kRun];
  for (int64_t first = b * kBlock; first < end; first += kRun) {
    const int64_t n = end - first < kRun ? end - first : kRun;
    for (int64_t l = 0; l < n; l += kLanes) uniform_run(uniforms, first + l, end, bits + l);
    for (int64_t l = 0; l < n; l += kWide) {
      const u64x8 q = fixed_weights(work.weights + first + l, p.scale);
      std::memcpy(weight + l, &q, sizeof q);
    }
    Remainder live = {};
    for (int64_t l = 0; l < n; ++l) {
      Remainder next = {0, first + l};
      offspring[first + l] = whole_offspring(grid, weight[l], &next.rest);
      if (l == 0) {
        live = next;
      } else {
        pair_up(&live, next, bits[l], p.total, certain, offspring);
      }
    }
    work.cumulative[first / kRun] = live.rest;
    work.guide[first / kRun] = static_cast<uint32_t>(live.owner);
  }
}

// What is left of the runs. A uniform belongs to the first particle of what arrives.
template <typename T>
void pair_runs(const Work<T>& work, int64_t* offspring) {
  const Population& p = work.population;
  const Uniforms uniforms = uniforms_of(work.call, p);
  const int64_t certain = p.forced_rest ? p.pinned : -1;
  int64_t count = (p.particles + kRun - 1) / kRun;
  for (int64_t particles = kRun; count > 1; particles *= kRun) {
    const int64_t groups = (count + kRun - 1) / kRun;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t last = (g + 1) * kRun < count ? (g + 1) * kRun : count;
      Remainder live = {work.cumulative[g * kRun], work.guide[g * kRun]};
      for (int64_t e = g * kRun + 1; e < last; ++e) {
        pair_up(&live, {work.cumulative[e], work.guide[e]}, uniform_bits(uniforms, e * particles),
                p.total, certain, offspring);
      }
      work.cumulative[g] = live.rest;
      work.guide[g] = static_cast<uint32_t>(live.owner);
    }
    count = groups;
  }
}

}  // namespace
}  // namespace winnow
