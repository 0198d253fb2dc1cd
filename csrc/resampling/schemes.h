// What each scheme does with the cumulative weights of a population, block by block: systematic and
// stratified count the points of a grid, multinomial, residual and killing search for independent
// draws; ssp (pairing.h) and optimal (optimal.h) have rooms of their own.
#pragma once

#include <cstdint>

#include "resampling/optimal.h"
#include "resampling/pairing.h"
#include "resampling/pinned.h"
#include "resampling/spread.h"
#include "resampling/work.h"

namespace winnow {
namespace {

// Below this a search over all of a population takes as long as finding its start.
constexpr int64_t kGuideFrom = 32;

// Points of the guide: a power of two below the number of particles, so that a point's cell is the
// top bits of its uniform. Returns the number of bits, 0 where the whole population is searched.
inline int guide_bits(int64_t particles) {
  if (particles < kGuideFrom) return 0;
  int bits = 0;
  while ((int64_t{2} << bits) <= particles) ++bits;
  return bits;
}

inline PointGrid grid_of(const Uniforms& uniforms, const Population& p) {
  const bool systematic = uniforms.call.scheme == Scheme::kSystematic;
  return make_grid(p.samples, p.total,
                   systematic ? multiply_high(uniform_bits(uniforms, 0), p.total) : 0);
}

// Cumulative weights of block b, tile by tile: take(first index, number, cumulative weights).
template <typename T, typename Take>
void each_tile(const Work<T>& work, int64_t b, uint64_t* tile, const Take& take) {
  uint64_t before = work.block(b).start;
  const int64_t end = b * kBlock + work.length(b);
  for (int64_t i = b * kBlock; i < end; i += kTile) {
    const int64_t n = end - i < kTile ? end - i : kTile;
    before = cumulate(work.weights + i, (n + kLanes - 1) / kLanes * kLanes, work.population.scale,
                      before, tile);
    take(i, n, tile);
  }
}

template <typename T>
void spread_block(const Work<T>& work, const Arrays<T>& arrays, int64_t b) {
  const ResampleCall& call = work.call;
  const Population& p = work.population;
  if (call.scheme == Scheme::kSsp) return pair_block(work, arrays.offspring, b);
  if (call.scheme == Scheme::kOptimal) return spread_kept_and_drawn(work, arrays, b);
  uint64_t tile[kTile];
  if (searches(call.scheme)) {
    each_tile(work, b, tile, [&](int64_t first, int64_t n, const uint64_t* cumulative) {
      std::memcpy(work.cumulative + first, cumulative, static_cast<size_t>(n) * 8);
      std::memset(arrays.offspring + first, 0, static_cast<size_t>(n) * 8);
    });
    return;
  }
  const bool stratified = call.scheme == Scheme::kStratified;
  const Uniforms uniforms = uniforms_of(call, p);
  const PointGrid grid = grid_of(uniforms, p);
  const Block& block = work.block(b);
  int64_t previous = b == 0 ? 0 : count_at(uniforms, grid, stratified, block.start);
  const int64_t limit = b + 1 == p.blocks
                            ? p.samples
                            : count_at(uniforms, grid, stratified, block.start + block.total);
  int64_t* ancestors = call.keep_slots ? nullptr : arrays.ancestors;
  int64_t counts[kTile];
  each_tile(work, b, tile, [&](int64_t first, int64_t n, const uint64_t* cumulative) {
    if (stratified) {
      for (int64_t i = 0; i < n; i += kLanes) {
        stratified_counts(uniforms, grid, cumulative + i, counts + i);
      }
    } else {
      for (int64_t i = 0; i < n; i += kWide) systematic_counts(grid, cumulative + i, counts + i);
    }
    previous = scatter(counts, n, first, previous, limit, arrays.offspring, ancestors);
  });
}

// The guide's cell g begins at the first particle whose cumulative weight exceeds g / cells of the
// total: the ancestors of a systematic grid without offset.
template <typename T>
void guide_block(const Work<T>& work, int64_t b, uint64_t total) {
  const Population& p = work.population;
  const int64_t cells = int64_t{1} << guide_bits(p.particles);
  const PointGrid grid = make_grid(cells, total, 0);
  const uint64_t* cumulative = work.cumulative;
  const int64_t begin = b * kBlock;
  const int64_t end = begin + work.length(b);
  const Uniforms uniforms = uniforms_of(work.call, p);
  const auto at = [&](uint64_t c) { return count_at(uniforms, grid, false, c); };
  int64_t previous = b == 0 ? 0 : at(cumulative[begin - 1]);
  const int64_t limit = at(cumulative[end - 1]);
  int64_t counts[kTile];
  uint64_t tile[kTile];
  for (int64_t i = begin; i < end; i += kTile) {
    const int64_t n = end - i < kTile ? end - i : kTile;
    std::memcpy(tile, cumulative + i, static_cast<size_t>(n) * 8);
    for (int64_t l = n; l % kWide != 0; ++l) tile[l] = tile[n - 1];
    for (int64_t l = 0; l < n; l += kWide) systematic_counts(grid, tile + l, counts + l);
    previous = scatter<uint32_t>(counts, n, i, previous, limit, nullptr, work.guide);
  }
  if (b + 1 == p.blocks) work.guide[cells] = static_cast<uint32_t>(p.particles - 1);
}

constexpr int64_t kBatch = 4 * kLanes;

// The particles that n <= kBatch uniforms fall on. A huge population's cells, cumulative weights
// and counts are each a cache miss per draw, so they are asked for a batch ahead.
template <typename T>
void find(const Work<T>& work, uint64_t total, const uint64_t* uniform, int64_t n,
          const int64_t* offspring, uint32_t* found) {
  const int bits = guide_bits(work.population.particles);
  uint32_t high[kBatch];
  if (bits == 0) {
    for (int64_t l = 0; l < n; ++l) found[l] = 0;
    for (int64_t l = 0; l < n; ++l) high[l] = static_cast<uint32_t>(work.population.particles - 1);
  } else {
    for (int64_t l = 0; l < n; ++l) __builtin_prefetch(work.guide + (uniform[l] >> (64 - bits)));
    for (int64_t l = 0; l < n; ++l) {
      const uint64_t cell = uniform[l] >> (64 - bits);
      found[l] = work.guide[cell];
      high[l] = work.guide[cell + 1];
      __builtin_prefetch(work.cumulative + found[l]);
    }
  }
  for (int64_t l = 0; l < n; ++l) {
    found[l] = static_cast<uint32_t>(
        search(work.cumulative, found[l], high[l], multiply_high(uniform[l], total)));
    __builtin_prefetch(offspring + found[l], 1);
  }
}

inline void count(const ResampleCall& call, const uint32_t* found, int64_t n, int64_t* offspring) {
  for (int64_t l = 0; l < n; ++l) {
    if (call.shared) {
      __atomic_fetch_add(offspring + found[l], int64_t{1}, __ATOMIC_RELAXED);
    } else {
      ++offspring[found[l]];
    }
  }
}

// Independent draws [begin, end) from cumulative weights: counted, and written where asked.
template <typename T>
void draw(const Work<T>& work, uint64_t total, int64_t begin, int64_t end, int64_t* offspring,
          int64_t* ancestors) {
  const Uniforms uniforms = uniforms_of(work.call, work.population);
  uint64_t uniform[kBatch];
  uint32_t found[kBatch];
  for (int64_t j = begin; j < end; j += kBatch) {
    const int64_t n = end - j < kBatch ? end - j : kBatch;
    for (int64_t l = 0; l < n; l += kLanes) uniform_run(uniforms, j + l, end, uniform + l);
    find(work, total, uniform, n, offspring, found);
    if (ancestors != nullptr) {
      for (int64_t l = 0; l < n; ++l) ancestors[j + l] = found[l];
    }
    count(work.call, found, n, offspring);
  }
}

// Slots [begin, end): particle k stays with probability w_k / max w, and is replaced by a draw
// otherwise. The largest weight is 1, in fixed point a power of two.
template <typename T>
void kill(const Work<T>& work, int64_t begin, int64_t end, int64_t* offspring, int64_t* ancestors) {
  const Population& p = work.population;
  const Uniforms uniforms = {work.call, p.row, {}};
  const auto shift = static_cast<int>(64 - exponent_of(p.scale));
  uint64_t uniform[kBatch];
  uint32_t particle[kBatch];
  uint32_t slot[kBatch];
  uint32_t found[kBatch];
  uint64_t before = begin == 0 ? 0 : work.cumulative[begin - 1];
  for (int64_t j = begin; j < end; j += kBatch) {
    const int64_t n = end - j < kBatch ? end - j : kBatch;
    for (int64_t l = 0; l < n; l += kLanes) uniform_run(uniforms, j + l, end, uniform + l);
    int64_t killed = 0;
    for (int64_t l = 0; l < n; ++l) {
      const uint64_t weight = work.cumulative[j + l] - before;
      before = work.cumulative[j + l];
      slot[killed] = static_cast<uint32_t>(l);
      particle[l] = static_cast<uint32_t>(j + l);
      killed += (uniform[l] >> shift) >= weight;
    }
    for (int64_t i = 0; i < killed; i += kLanes) {
      uint64_t element[kLanes] = {};
      for (int64_t l = 0; l < kLanes && i + l < killed; ++l) {
        element[l] = static_cast<uint64_t>(p.particles + j + slot[i + l]);
      }
      uniform_lanes(uniforms, element, 2 * p.particles, uniform + i);
    }
    find(work, p.total, uniform, killed, offspring, found);
    for (int64_t i = 0; i < killed; ++i) particle[slot[i]] = found[i];
    if (p.forced.element >= j && p.forced.element < j + n) {
      particle[p.forced.element - j] = static_cast<uint32_t>(p.pinned);
    }
    if (ancestors != nullptr) {
      for (int64_t l = 0; l < n; ++l) ancestors[j + l] = particle[l];
    }
    count(work.call, particle, n, offspring);
  }
}

// floor(M w) offspring each, and the rest drawn in proportion to the remainders, which are exact
// integers below the total; a shift keeps their sum within 64 bits.
template <typename T>
void residual(const Work<T>& work, const Arrays<T>& arrays) {
  const Population& p = work.population;
  int shift = 0;
  while ((int64_t{1} << shift) < p.particles) ++shift;
  const PointGrid grid = make_grid(p.samples, p.total, 0);
  uint64_t before = 0;
  uint64_t rests = 0;
  int64_t drawn = p.samples;
  for (int64_t k = 0; k < p.particles; ++k) {
    const uint64_t weight = work.cumulative[k] - before;
    before = work.cumulative[k];
    const Split share = split(grid, weight);
    arrays.offspring[k] = share.whole;
    drawn -= share.whole;
    work.cumulative[k] = rests += share.rest >> shift;
  }
  if (p.forced.rest) {
    ++arrays.offspring[p.pinned];
    --drawn;
  }
  // What is left over is a whole number of totals: nothing, or far more than the shift drops.
  if (drawn == 0) return;
  if (guide_bits(p.particles) != 0) {
    for (int64_t b = 0; b < p.blocks; ++b) guide_block(work, b, rests);
  }
  draw(work, rests, 0, drawn, arrays.offspring, nullptr);
}

// Particle k as often as copies(k) says, ascending, `samples` in all.
template <typename Index, typename Copies>
void expand(int64_t particles, int64_t samples, Index* ancestors, const Copies& copies) {
  int64_t counts[kTile];
  int64_t end = 0;
  int64_t previous = 0;
  for (int64_t i = 0; i < particles; i += kTile) {
    const int64_t n = particles - i < kTile ? particles - i : kTile;
    for (int64_t l = 0; l < n; ++l) counts[l] = end += copies(i + l);
    previous = scatter<Index>(counts, n, i, previous, samples, nullptr, ancestors);
  }
}

// Survivors stay where they are; their further offspring fill the freed slots in ascending order
// (Murray, Lee and Jacob 2016). Lists of both first: a loop that asks per slot what to do costs a
// mispredicted branch for most.
inline void fill_freed_slots(const int64_t* offspring, int64_t particles, uint32_t* freed,
                             uint32_t* sources, int64_t* ancestors) {
  int64_t count = 0;
  for (int64_t k = 0; k < particles; ++k) {
    ancestors[k] = k;
    freed[count] = static_cast<uint32_t>(k);
    count += offspring[k] == 0;
  }
  expand(particles, count, sources,
         [&](int64_t k) { return offspring[k] > 0 ? offspring[k] - 1 : 0; });
  for (int64_t i = 0; i < count; ++i) ancestors[freed[i]] = sources[i];
}

// From offspring to slots, where that is not done yet.
template <typename T>
void arrange(const Work<T>& work, const Arrays<T>& arrays) {
  const Population& p = work.population;
  const Scheme scheme = work.call.scheme;
  int64_t* ancestors = arrays.ancestors;
  if (work.call.keep_slots) {
    return fill_freed_slots(arrays.offspring, p.particles, work.freed,
                            work.freed + (p.particles + 1), ancestors);
  }
  if (scheme == Scheme::kResidual || scheme == Scheme::kSsp) {
    expand(p.particles, p.samples, ancestors, [&](int64_t k) { return arrays.offspring[k]; });
  }
  if (p.pinned < 0 || scheme == Scheme::kMultinomial) return;
  if (scheme == Scheme::kKilling) {
    ancestors[p.forced.element] = ancestors[p.pinned];
    ancestors[p.pinned] = p.pinned;
  } else {
    rotate_to_pinned(work.call, p, arrays.offspring, ancestors);
  }
}

}  // namespace
}  // namespace winnow
