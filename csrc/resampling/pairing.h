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

// `live` meets `next`; who is left is `live`.
inline void meet(Remainder* live, const Remainder& next, uint64_t bits, uint64_t total,
                 int64_t certain, int64_t* offspring) {
  const Pairing result = pair_up(*live, next, bits, total, certain);
  *live = result.left;
  // The one that is left gains nothing; adding that to it spares a branch.
  offspring[result.completed < 0 ? live->owner : result.completed] += result.completed >= 0;
}

template <typename T>
void pair_block(const Work<T>& work, int64_t* offspring, int64_t b) {
  const Population& p = work.population;
  const PointGrid grid = make_grid(p.samples, p.total, 0);
  const Uniforms uniforms = uniforms_of(work.call, p);
  const int64_t certain = p.forced.rest ? p.pinned : -1;
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
      const Split share = split(grid, weight[l]);
      const Remainder next = {share.rest, first + l};
      offspring[first + l] = share.whole;
      if (l == 0) {
        live = next;
      } else {
        meet(&live, next, bits[l], p.total, certain, offspring);
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
  const int64_t certain = p.forced.rest ? p.pinned : -1;
  int64_t count = (p.particles + kRun - 1) / kRun;
  for (int64_t particles = kRun; count > 1; particles *= kRun) {
    const int64_t groups = (count + kRun - 1) / kRun;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t last = (g + 1) * kRun < count ? (g + 1) * kRun : count;
      Remainder live = {work.cumulative[g * kRun], work.guide[g * kRun]};
      for (int64_t e = g * kRun + 1; e < last; ++e) {
        meet(&live, {work.cumulative[e], work.guide[e]}, uniform_bits(uniforms, e * particles),
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
