// The optimal scheme of Fearnhead and Clifford (2003): particles above a threshold c keep their
// weight, the others survive with probability w / c and then weigh c, where c is such that M
// survive on average: sum min(1, w / c) = M. They are drawn from a systematic grid, on which none
// of them holds more than one point. Kept are the fixed-point weights q with q * drawn >=
// drawn_total, the number and the total of the others. Where M particles or fewer have any weight,
// all are kept, in turns until M slots are full, and share their weight among their slots.
#pragma once

#include <cstdint>

#include "resampling/spread.h"
#include "resampling/work.h"

namespace winnow {
namespace {

// Number and total of the fixed weights at or above the threshold, and for each block what lies
// before it: kept particles, and the total of the others.
template <typename T>
void split_at_threshold(const Work<T>& work) {
  Population& p = work.population;
  p.kept = 0;
  uint64_t others = 0;
  for (int64_t b = 0; b < p.blocks; ++b) {
    Block& block = work.block(b);
    block.kept = p.kept;
    block.start = others;
    u64x8 count = {};
    u64x8 light = {};
    const int64_t end = b * kBlock + work.length(b);  // weights are zero up to whole lanes
    for (int64_t k = b * kBlock; k < end; k += kWide) {
      const u64x8 q = fixed_weights(work.weights + k, p.scale);
      for (int h = 0; h < kParts; ++h) {
        const auto below = (WordPart)((LongPart)q.part[h] < (LongPart)(WordPart{} + p.threshold));
        count.part[h] += below + 1;
        light.part[h] += q.part[h] & below;
      }
    }
    p.kept += static_cast<int64_t>(sum_wide(count));
    others += sum_wide(light);
  }
  p.drawn_total = others;
}

template <typename T>
void find_threshold(const Work<T>& work) {
  Population& p = work.population;
  p.threshold = 1;
  p.drawn = 0;
  split_at_threshold(work);
  if (p.kept <= p.samples) return;
  // From above: what a lower threshold keeps leaves a lower mean to the others, until it keeps
  // nothing more. Every pass but the last keeps more, and soon all that 60 bits tell apart.
  p.drawn_total = p.total;
  p.kept = 0;
  int64_t before = -1;
  while (p.kept != before) {
    before = p.kept;
    p.drawn = p.samples - p.kept;
    const auto drawn = static_cast<uint64_t>(p.drawn);
    // At or above every weight where nothing is drawn at all.
    p.threshold = p.drawn > 0 ? (p.drawn_total + drawn - 1) / drawn : p.total + 1;
    split_at_threshold(work);
  }
}

template <typename T>
void spread_kept_and_drawn(const Work<T>& work, const Arrays<T>& arrays, int64_t b) {
  const Population& p = work.population;
  const Uniforms uniforms = uniforms_of(work.call, p);
  // Without anything to draw the grid has no points.
  const uint64_t total = p.drawn > 0 ? p.drawn_total : 1;
  const uint64_t offset = p.drawn > 0 ? multiply_high(uniform_bits(uniforms, 0), total) : 0;
  const PointGrid grid = make_grid(p.drawn, total, offset);
  const auto of_kept = [&](int64_t kept) {
    return slots_of_kept(kept, p.kept, p.drawn, p.samples);
  };
  const auto slots = [&](uint64_t light, int64_t kept) {
    return (p.drawn > 0 ? count_at(uniforms, grid, false, light) : 0) + of_kept(kept);
  };
  uint64_t light = work.block(b).start;
  int64_t kept = work.block(b).kept;
  int64_t previous = b == 0 ? 0 : slots(light, kept);
  const int64_t limit =
      b + 1 == p.blocks ? p.samples : slots(work.block(b + 1).start, work.block(b + 1).kept);
  int64_t* ancestors = work.call.keep_slots ? nullptr : arrays.ancestors;
  const int64_t end = b * kBlock + work.length(b);
  uint64_t cumulative[kTile];
  int64_t counts[kTile] = {};
  int64_t added[kTile];
  for (int64_t first = b * kBlock; first < end; first += kTile) {
    const int64_t n = end - first < kTile ? end - first : kTile;
    for (int64_t l = 0; l < n; l += kWide) {
      const u64x8 q = fixed_weights(work.weights + first + l, p.scale);
      std::memcpy(cumulative + l, &q, sizeof q);
      for (int64_t i = l; i < l + kWide; ++i) {
        const bool keeps = cumulative[i] >= p.threshold;
        light += keeps ? 0 : cumulative[i];
        kept += keeps;
        cumulative[i] = light;
        added[i] = kept;
      }
      if (p.drawn > 0) systematic_counts(grid, cumulative + l, counts + l);
    }
    for (int64_t l = 0; l < n; ++l) counts[l] += of_kept(added[l]);
    previous = scatter(counts, n, first, previous, limit, arrays.offspring, ancestors);
    for (int64_t l = 0; l < n; ++l) counts[l] = 0;
  }
}

// Slots [begin, end): M w / sum w of a kept particle, shared among its slots, M c / sum w of a
// drawn one. Their mean is 1, as after every other scheme.
template <typename T>
void weigh_kept_and_drawn(const Work<T>& work, const Arrays<T>& arrays, int64_t begin,
                          int64_t end) {
  using W = WeightOf<T>;
  const Population& p = work.population;
  const auto samples = static_cast<double>(p.samples);
  const double common =
      p.drawn > 0
          ? log_of(samples * (static_cast<double>(p.drawn_total) / static_cast<double>(p.drawn)) /
                   static_cast<double>(p.total))
          : 0.0;
  const double own = log_of(samples) - log_of(p.sum);
  for (int64_t j = begin; j < end; ++j) {
    const int64_t k = arrays.ancestors[j];
    double log_weight = common;
    if (work.fixed_weight(k) >= p.threshold) {
      W x;
      carry(arrays.log_weights + k, 1, &x);
      const double relative = static_cast<double>(x) - p.top;
      log_weight = (relative == relative ? relative : 0.0) + own;  // infinite ones share the mass
      if (arrays.offspring[k] > 1) log_weight -= log_of(static_cast<double>(arrays.offspring[k]));
    }
    arrays.new_log_weights[j] = static_cast<W>(log_weight);
  }
}

}  // namespace
}  // namespace winnow
