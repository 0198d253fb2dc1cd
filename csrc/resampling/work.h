// One population while it is resampled: its call, its scratch memory, its results.
#pragma once

#include <cstdint>

#include "resampling/resample_simd.h"
#include "resampling/weigh.h"

namespace winnow {
namespace {

constexpr int64_t kTile = 256;  // cumulative weights and counts of a tile: 4 KB on the stack
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
  // As block_total rounds it.
  uint64_t fixed_weight(int64_t k) const {
    return static_cast<uint64_t>(static_cast<double>(weights[k]) * population.scale);
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

template <typename T>
void start(const Work<T>& work, int64_t row, int64_t particles, int64_t samples, int64_t pinned) {
  Population& p = work.population;
  p.row = row;
  p.particles = particles;
  p.samples = samples;
  p.blocks = (particles + kBlock - 1) / kBlock;
  p.items = p.blocks;
  p.pinned = pinned;
  p.forced = {};
  p.log_z = 0.0;
  p.ess = 0.0;
  p.resampled = false;
  p.status = 0;
}

}  // namespace
}  // namespace winnow
