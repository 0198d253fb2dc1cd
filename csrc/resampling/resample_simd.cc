// One population: maximum, weights with ESS and log Z, fixed-point total, then offspring by the
// scheme and ancestors from them. Every step works on blocks of a fixed size; a population that
// fits one block runs all steps on a thread, a huge one is split block by block with the same
// result.
//
// Memory of a float32 population of K: two reads of the log weights, one write and two reads of the
// weights (scratch, 4 K bytes), and the outputs; beyond one block nothing else grows with K, except
// 8 K bytes of cumulative weights for the schemes that search them.
#include "resampling/resample_simd.h"

#include <cmath>

#include "common/dispatch_simd.h"
#include "resampling/small_populations.h"
#include "resampling/spread.h"
#include "resampling/weigh.h"

namespace winnow::CPU_CAPABILITY {
namespace {

constexpr int64_t kTile = 256;  // cumulative weights and counts of a tile: 4 KB on the stack
// Below this a search over all of a population takes as long as finding its start.
constexpr int64_t kGuideFrom = 32;

static_assert(sizeof(Block) <= kBytesPerBlock, "a block's sums have a cache line of their own");

template <typename T>
struct Work {
  using W = WeightOf<T>;
  const ResampleCall& call;
  char* scratch;
  ResampleScratch at;
  Population& population;
  W* weights;
  uint64_t* cumulative;
  uint32_t* guide;
  uint32_t* freed;

  Work(const ResampleCall& c, void* memory)
      : call(c),
        scratch(static_cast<char*>(memory)),
        at(resample_scratch(c)),
        population(*static_cast<Population*>(memory)),
        weights(reinterpret_cast<W*>(scratch + at.weights)),
        cumulative(reinterpret_cast<uint64_t*>(scratch + at.cumulative)),
        guide(reinterpret_cast<uint32_t*>(scratch + at.guide)),
        freed(reinterpret_cast<uint32_t*>(scratch + at.freed)) {}

  Block& block(int64_t b) const {
    return *reinterpret_cast<Block*>(scratch + at.blocks + b * kBytesPerBlock);
  }
  int64_t length(int64_t b) const {
    const int64_t rest = population.particles - b * kBlock;
    return rest < kBlock ? rest : kBlock;
  }
  bool searches() const {
    return call.scheme == Scheme::kMultinomial || call.scheme == Scheme::kResidual;
  }
};

// Log weights and results of one population: a row of the call, or its live particles gathered.
template <typename T>
struct Arrays {
  const T* log_weights;
  int64_t* ancestors;
  int64_t* offspring;
  WeightOf<T>* new_log_weights;
};

template <typename T>
Arrays<T> row_arrays(const ResampleCall& call, int64_t row) {
  return {static_cast<const T*>(call.log_weights) + row * call.stride,
          call.ancestors + row * call.samples, call.offspring + row * call.particles,
          static_cast<WeightOf<T>*>(call.new_log_weights) + row * call.samples};
}

// Points of the guide: a power of two below the number of particles, so that a point's cell is the
// top bits of its uniform. Returns the number of bits, 0 where the whole population is searched.
int guide_bits(int64_t particles) {
  if (particles < kGuideFrom) return 0;
  int bits = 0;
  while ((int64_t{2} << bits) <= particles) ++bits;
  return bits;
}

template <typename T>
void start(const Work<T>& work, int64_t row, int64_t particles, int64_t samples) {
  Population& p = work.population;
  p.row = row;
  p.particles = particles;
  p.samples = samples;
  p.blocks = (particles + kBlock - 1) / kBlock;
  p.items = p.blocks;
  p.log_z = 0.0;
  p.ess = 0.0;
  p.resampled = false;
  p.status = 0;
}

Grid grid_of(const ResampleCall& call, const Population& p) {
  const bool systematic = call.scheme == Scheme::kSystematic;
  return make_grid(p.samples, p.total,
                   systematic ? multiply_high(uniform_bits(call, p.row, 0), p.total) : 0);
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
  uint64_t tile[kTile];
  if (work.searches()) {
    each_tile(work, b, tile, [&](int64_t first, int64_t n, const uint64_t* cumulative) {
      std::memcpy(work.cumulative + first, cumulative, static_cast<size_t>(n) * 8);
      std::memset(arrays.offspring + first, 0, static_cast<size_t>(n) * 8);
    });
    return;
  }
  const bool stratified = call.scheme == Scheme::kStratified;
  const Grid grid = grid_of(call, p);
  const Block& block = work.block(b);
  int64_t previous = b == 0 ? 0 : count_at(call, p.row, grid, stratified, block.start);
  const int64_t limit = b + 1 == p.blocks
                            ? p.samples
                            : count_at(call, p.row, grid, stratified, block.start + block.total);
  int64_t* ancestors = call.keep_slots ? nullptr : arrays.ancestors;
  int64_t counts[kTile];
  each_tile(work, b, tile, [&](int64_t first, int64_t n, const uint64_t* cumulative) {
    if (stratified) {
      for (int64_t i = 0; i < n; i += kLanes) {
        stratified_counts(call, p.row, grid, cumulative + i, counts + i);
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
  const Grid grid = make_grid(cells, total, 0);
  const uint64_t* cumulative = work.cumulative;
  const int64_t begin = b * kBlock;
  const int64_t end = begin + work.length(b);
  const auto at = [&](uint64_t c) { return count_at(work.call, p.row, grid, false, c); };
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

// Independent draws [begin, end) from cumulative weights: counted, and written where asked. A huge
// population's cells, cumulative weights and counts are each a cache miss per draw, so they are
// asked for a batch ahead.
template <typename T>
void draw(const Work<T>& work, uint64_t total, int64_t begin, int64_t end, int64_t* offspring,
          int64_t* ancestors) {
  constexpr int64_t kBatch = 4 * kLanes;
  const Population& p = work.population;
  const int bits = guide_bits(p.particles);
  uint64_t uniform[kBatch];
  uint32_t low[kBatch];
  uint32_t high[kBatch];
  for (int64_t j = begin; j < end; j += kBatch) {
    const int64_t n = end - j < kBatch ? end - j : kBatch;
    for (int64_t l = 0; l < n; l += kLanes) {
      uint64_t element[kLanes];
      for (int i = 0; i < kLanes; ++i) element[i] = static_cast<uint64_t>(j + l + i);
      uniform_lanes(work.call, p.row, element, end, uniform + l);
    }
    if (bits == 0) {
      for (int64_t l = 0; l < n; ++l) low[l] = 0;
      for (int64_t l = 0; l < n; ++l) high[l] = static_cast<uint32_t>(p.particles - 1);
    } else {
      for (int64_t l = 0; l < n; ++l) __builtin_prefetch(work.guide + (uniform[l] >> (64 - bits)));
      for (int64_t l = 0; l < n; ++l) {
        const uint64_t cell = uniform[l] >> (64 - bits);
        low[l] = work.guide[cell];
        high[l] = work.guide[cell + 1];
        __builtin_prefetch(work.cumulative + low[l]);
      }
    }
    for (int64_t l = 0; l < n; ++l) {
      low[l] = static_cast<uint32_t>(
          search(work.cumulative, low[l], high[l], multiply_high(uniform[l], total)));
      __builtin_prefetch(offspring + low[l], 1);
      if (ancestors != nullptr) ancestors[j + l] = low[l];
    }
    for (int64_t l = 0; l < n; ++l) {
      if (work.call.shared) {
        __atomic_fetch_add(offspring + low[l], int64_t{1}, __ATOMIC_RELAXED);
      } else {
        ++offspring[low[l]];
      }
    }
  }
}

// floor(M w) offspring each, and the rest drawn in proportion to the remainders, which are exact
// integers below the total; a shift keeps their sum within 64 bits.
template <typename T>
void residual(const Work<T>& work, const Arrays<T>& arrays) {
  const Population& p = work.population;
  int shift = 0;
  while ((int64_t{1} << shift) < p.particles) ++shift;
  const Grid grid = make_grid(p.samples, p.total, 0);
  const auto total = static_cast<int64_t>(p.total);
  uint64_t before = 0;
  uint64_t rests = 0;
  int64_t drawn = p.samples;
  for (int64_t k = 0; k < p.particles; ++k) {
    const uint64_t weight = work.cumulative[k] - before;
    before = work.cumulative[k];
    auto whole = static_cast<int64_t>(static_cast<double>(weight) * grid.ratio);
    auto rest =
        static_cast<int64_t>(grid.samples * weight - static_cast<uint64_t>(whole) * p.total);
    for (; rest >= total; rest -= total) ++whole;
    for (; rest < 0; rest += total) --whole;
    arrays.offspring[k] = whole;
    drawn -= whole;
    work.cumulative[k] = rests += static_cast<uint64_t>(rest) >> shift;
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
void fill_freed_slots(const int64_t* offspring, int64_t particles, uint32_t* freed,
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

// Slots [begin, end) of a population that is not resampled: the identity and the weights carried.
// Only one without any weight comes here with another number of samples, and then in turns.
template <typename T>
void keep(const Arrays<T>& arrays, const Population& p, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) {
    arrays.ancestors[j] = j < p.particles ? j : j % p.particles;
  }
  const int64_t known = end < p.particles ? end : p.particles;
  if (begin < known)
    carry(arrays.log_weights + begin, known - begin, arrays.new_log_weights + begin);
  for (int64_t j = begin > known ? begin : known; j < end; ++j) {
    arrays.new_log_weights[j] = -std::numeric_limits<WeightOf<T>>::infinity();
  }
}

template <typename T>
void step(const Work<T>& work, const Arrays<T>& arrays, int which, int64_t begin, int64_t end) {
  const ResampleCall& call = work.call;
  const Population& p = work.population;
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * kBlock;
    switch (which) {
      case kTop:
        block_top(arrays.log_weights + first, work.length(b), &work.block(b));
        break;
      case kWeigh:
        block_weights(arrays.log_weights + first, work.length(b), p.top, work.weights + first);
        block_sums(work.weights + first, work.length(b), &work.block(b));
        break;
      case kTotal:
        block_total(work.weights + first, work.length(b), p.scale, &work.block(b));
        break;
      case kSpread:
        spread_block(work, arrays, b);
        break;
      case kGuide:
        guide_block(work, b, p.total);
        break;
      case kSearch: {
        const int64_t last = p.samples - first < kBlock ? p.samples : first + kBlock;
        draw(work, p.total, first, last, arrays.offspring,
             call.keep_slots ? nullptr : arrays.ancestors);
        break;
      }
      case kFinish: {
        const int64_t last = p.samples - first < kBlock ? p.samples : first + kBlock;
        if (p.resampled) {
          for (int64_t j = first; j < last; ++j) arrays.new_log_weights[j] = 0;
        } else {
          keep(arrays, p, first, last);
        }
        break;
      }
    }
  }
}

template <typename T>
void settle(const Work<T>& work, const Arrays<T>& arrays, int which) {
  const ResampleCall& call = work.call;
  Population& p = work.population;
  const int64_t sample_blocks = (p.samples + kBlock - 1) / kBlock;
  switch (which) {
    case kTop: {
      p.top = -std::numeric_limits<double>::infinity();
      for (int64_t b = 0; b < p.blocks; ++b) {
        if (work.block(b).top > p.top) p.top = work.block(b).top;
        if (work.block(b).nan) p.status |= kStatusNan;
      }
      if (p.particles == 0) p.status |= kStatusNothingLive;
      if (p.particles > 0 && std::isinf(p.top)) {
        p.status |= p.top > 0 ? kStatusInfinite : kStatusNoWeight;
      }
      p.items = p.status & (kStatusNoWeight | kStatusNothingLive) ? 0 : p.blocks;
      break;
    }
    case kWeigh: {
      if (p.items == 0) break;
      p.sum = 0.0;
      p.squares = 0.0;
      for (int64_t b = 0; b < p.blocks; ++b) {
        p.sum += work.block(b).sum;
        p.squares += work.block(b).squares;
      }
      p.ess = p.sum * p.sum / p.squares;
      p.resampled =
          call.ess_threshold < 0 || p.ess < call.ess_threshold * static_cast<double>(p.particles);
      if (p.resampled) {
        p.log_z = log_of(p.sum / static_cast<double>(p.particles)) + p.top;
        // The total is at most 2^60: remainders of a wrong guess fit a signed integer.
        p.scale = power_of_two(59 - exponent_of(p.sum));
      }
      p.items = p.resampled ? p.blocks : 0;
      break;
    }
    case kTotal: {
      p.total = 0;
      for (int64_t b = 0; b < p.blocks && p.resampled; ++b) {
        work.block(b).start = p.total;
        p.total += work.block(b).total;
      }
      break;
    }
    case kSpread:
      if (p.resampled && call.scheme == Scheme::kResidual) residual(work, arrays);
      p.items = call.scheme == Scheme::kMultinomial && guide_bits(p.particles) != 0 ? p.items : 0;
      break;
    case kGuide:
      p.items = p.resampled && call.scheme == Scheme::kMultinomial ? sample_blocks : 0;
      break;
    case kSearch:
      p.items = sample_blocks;
      break;
    case kFinish:
      if (!p.resampled) {
        for (int64_t k = 0; k < p.particles; ++k) {
          arrays.offspring[k] =
              p.samples == p.particles
                  ? 1
                  : p.samples / p.particles + (k < p.samples % p.particles ? 1 : 0);
        }
      } else if (call.keep_slots) {
        fill_freed_slots(arrays.offspring, p.particles, work.freed, work.freed + (p.particles + 1),
                         arrays.ancestors);
      } else if (call.scheme == Scheme::kResidual) {
        expand(p.particles, p.samples, arrays.ancestors,
               [&](int64_t k) { return arrays.offspring[k]; });
      }
      break;
  }
}

template <typename T>
void report(const ResampleCall& call, const Population& p) {
  static_cast<WeightOf<T>*>(call.log_z)[p.row] = static_cast<WeightOf<T>>(p.log_z);
  static_cast<WeightOf<T>*>(call.ess)[p.row] = static_cast<WeightOf<T>>(p.ess);
  call.resampled[p.row] = p.resampled;
  call.status[p.row] = p.status;
}

template <typename T>
void run(const Work<T>& work, const Arrays<T>& arrays) {
  for (int which = 0; which < kSteps; ++which) {
    if (work.population.items > 0) step(work, arrays, which, 0, work.population.items);
    settle(work, arrays, which);
  }
  report<T>(work.call, work.population);
}

// The live particles are gathered and form a population of their own; the others keep their slot,
// and their weight is divided by what the live ones' weights were divided by.
template <typename T>
void run_masked(const Work<T>& work, int64_t row) {
  const ResampleCall& call = work.call;
  const Arrays<T> whole = row_arrays<T>(call, row);
  const auto* mask = static_cast<const unsigned char*>(call.mask) + row * call.mask_stride;
  const int64_t k = (call.particles + 15) / 16 * 16;
  char* memory = work.scratch + work.at.masked;
  auto* slot = reinterpret_cast<int64_t*>(memory);
  auto* live_log_weights = reinterpret_cast<T*>(memory + k * 8);
  const Arrays<T> live = {live_log_weights, reinterpret_cast<int64_t*>(memory + 2 * k * 8),
                          reinterpret_cast<int64_t*>(memory + 3 * k * 8),
                          reinterpret_cast<WeightOf<T>*>(memory + 4 * k * 8)};
  int64_t count = 0;
  for (int64_t i = 0; i < call.particles; ++i) {
    if (!mask[i]) continue;
    slot[count] = i;
    std::memcpy(live_log_weights + count, whole.log_weights + i, sizeof(T));
    ++count;
  }
  start(work, row, count, count);
  run(work, live);
  const double log_z = work.population.log_z;
  for (int64_t i = 0; i < call.particles; ++i) {
    if (mask[i]) continue;
    whole.ancestors[i] = i;
    whole.offspring[i] = 1;
    carry(whole.log_weights + i, 1, whole.new_log_weights + i);
    const double lowered = static_cast<double>(whole.new_log_weights[i]) - log_z;
    // Infinite on both sides: finished and live share the mass.
    whole.new_log_weights[i] = static_cast<WeightOf<T>>(lowered == lowered ? lowered : 0.0);
  }
  for (int64_t i = 0; i < count; ++i) {
    whole.ancestors[slot[i]] = slot[live.ancestors[i]];
    whole.offspring[slot[i]] = live.offspring[i];
    whole.new_log_weights[slot[i]] = live.new_log_weights[i];
  }
}

}  // namespace

void resample_rows(const ResampleCall& call, int64_t begin, int64_t end, void* scratch) {
  dispatch_element(call.type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, double>) {
      if (is_small(call)) {
        const int64_t k = call.particles;
        const auto small = k == 4    ? &resample_small<4, true, T>
                           : k < 4   ? &resample_small<4, false, T>
                           : k == 8  ? &resample_small<8, true, T>
                           : k < 8   ? &resample_small<8, false, T>
                           : k == 16 ? &resample_small<16, true, T>
                                     : &resample_small<16, false, T>;
        return small(call, begin, end);
      }
    }
    const Work<T> work(call, scratch);
    for (int64_t row = begin; row < end; ++row) {
      if (call.mask != nullptr) {
        run_masked(work, row);
      } else {
        start(work, row, call.particles, call.samples);
        run(work, row_arrays<T>(call, row));
      }
    }
  });
}

void resample_start(const ResampleCall& call, int64_t row, void* scratch) {
  dispatch_element(call.type, [&](auto zero) {
    using T = decltype(zero);
    start(Work<T>(call, scratch), row, call.particles, call.samples);
  });
}

void resample_step(const ResampleCall& call, int which, int64_t begin, int64_t end, void* scratch) {
  dispatch_element(call.type, [&](auto zero) {
    using T = decltype(zero);
    const Work<T> work(call, scratch);
    step(work, row_arrays<T>(call, work.population.row), which, begin, end);
  });
}

void resample_settle(const ResampleCall& call, int which, void* scratch) {
  dispatch_element(call.type, [&](auto zero) {
    using T = decltype(zero);
    const Work<T> work(call, scratch);
    settle(work, row_arrays<T>(call, work.population.row), which);
    if (which == kSteps - 1) report<T>(call, work.population);
  });
}

}  // namespace winnow::CPU_CAPABILITY
