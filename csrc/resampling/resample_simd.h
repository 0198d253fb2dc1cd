// What the operator and its loops share: a call in plain data, and the steps of one population.
#pragma once

#include <cstdint>

#include "common/cpu_capability.h"
#include "common/element_type.h"
#include "resampling/exact.h"
#include "resampling/scheme.h"

namespace winnow {

struct ResampleCall {
  const void* log_weights;  // row r at r * stride elements
  ElementType type;
  int64_t stride;
  int64_t rows;
  int64_t particles;
  int64_t samples;
  const void* mask;  // bytes, row r at r * mask_stride; null: all live
  int64_t mask_stride;
  const void* uniforms;  // null: drawn from the seed
  ElementType uniforms_type;
  int64_t uniforms_stride;
  const int64_t* pinned;  // one particle per population; null: none
  uint64_t seed;
  Scheme scheme;
  double ess_threshold;  // negative: always resample
  bool keep_slots;
  bool shared;  // several threads work on one population
  int64_t* ancestors;
  int64_t* offspring;
  void* new_log_weights;  // float, or double for double weights
  void* log_z;
  void* ess;
  bool* resampled;
  int32_t* status;
};

// One population while it is worked on; `items` is the number of independent pieces of its next
// step.
struct Population {
  int64_t row;
  int64_t particles;
  int64_t samples;
  int64_t blocks;
  int64_t items;
  double top;
  double sum;
  double squares;
  double scale;  // weight to fixed point
  uint64_t total;
  int64_t pinned;  // the particle that keeps its slot, -1: none
  Forced forced;
  uint64_t threshold;    // optimal: the least fixed weight that is kept as it is
  int64_t kept;          // optimal: how many are
  int64_t drawn;         // optimal: how many of the others are drawn,
  uint64_t drawn_total;  // and their total
  double log_z;
  double ess;
  bool resampled;
  int32_t status;
};

// The steps, in order. Pieces of a step may run on different threads; between steps one thread
// settles what they found.
enum ResampleStep : int { kTop, kWeigh, kTotal, kSpread, kGuide, kSearch, kFinish, kSteps };

namespace {

// Where the parts of a population's scratch memory lie, in bytes.
struct ResampleScratch {
  int64_t blocks;
  int64_t weights;
  int64_t cumulative;
  int64_t guide;
  int64_t freed;
  int64_t masked;
  int64_t bytes;
};

constexpr int64_t kBytesPerBlock = 64;
[[maybe_unused]] inline bool searches(Scheme scheme) {
  return scheme == Scheme::kMultinomial || scheme == Scheme::kResidual ||
         scheme == Scheme::kKilling;
}

[[maybe_unused]] inline ResampleScratch resample_scratch(const ResampleCall& call) {
  const auto align = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
  const int64_t k = (call.particles + 15) / 16 * 16;
  // A search reads 4 cumulative weights beyond; ssp has the remainder and the owner of each run.
  const bool runs = call.scheme == Scheme::kSsp;
  const int64_t sums = searches(call.scheme) ? k + 8 : runs ? k / kRun + 1 : 0;
  const int64_t indices = searches(call.scheme) ? k + 1 : runs ? k / kRun + 1 : 0;
  ResampleScratch at;
  at.blocks = align(sizeof(Population));
  at.weights = at.blocks + (call.particles / kBlock + 1) * kBytesPerBlock;
  at.cumulative = at.weights + align(k * (call.type == ElementType::kDouble ? 8 : 4));
  at.guide = at.cumulative + align(sums * 8);
  at.freed = at.guide + align(indices * 4);
  at.masked = at.freed + (call.keep_slots ? align(2 * (k + 1) * 4) : 0);
  // Of the live particles: slot, log weight, ancestor, offspring, new log weight.
  at.bytes = at.masked + (call.mask != nullptr ? 5 * k * 8 : 0);
  return at;
}

}  // namespace

// Whole populations [begin, end), one after another.
WINNOW_SIMD_DECLARE(resample_rows, const ResampleCall& call, int64_t begin, int64_t end,
                    void* scratch)
// Pieces [begin, end) of one step of the population that `scratch` holds, and what follows a step.
WINNOW_SIMD_DECLARE(resample_start, const ResampleCall& call, int64_t row, void* scratch)
WINNOW_SIMD_DECLARE(resample_step, const ResampleCall& call, int step, int64_t begin, int64_t end,
                    void* scratch)
WINNOW_SIMD_DECLARE(resample_settle, const ResampleCall& call, int step, void* scratch)

}  // namespace winnow
