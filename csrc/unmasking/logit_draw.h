// The noise of draws: exact towards the tail.
#pragma once

#include <cmath>

#include "common/philox.h"
#include "unmasking/logit_rows.h"

namespace winnow {
namespace {

// (0, 1), 64 bits, exact towards 0. constexpr, so that kernels may call it.
constexpr double open_uniform(uint32_t low, uint32_t high) {
  const uint64_t bits = (static_cast<uint64_t>(high) << 32) | low;
  const double u = (static_cast<double>(bits) + 0.5) * 0x1p-64;
  return u < 1.0 - 0x1p-53 ? u : 1.0 - 0x1p-53;
}

// The earliest of exponential clocks, one per block of the vocabulary and keyed by it: each block
// wins in proportion to its weight. On the CPU; the GPU's race is in logit_rows_kernel.cuh.
class BlockRace {
 public:
  BlockRace(uint64_t seed, int64_t key) : seed_(seed), key_(static_cast<uint64_t>(key)) {}

  // `place`: of the block in the whole vocabulary.
  void enter(int64_t block, int64_t place, double weight) {
    if (!(weight > 0.0)) return;
    const Philox4 bits = philox(seed_, key_, static_cast<uint64_t>(place * kLogitBlock));
    const double u = open_uniform(bits.x[0], bits.x[1]);
    // A clock shows at least u: most need no logarithm.
    if (block_ >= 0 && u >= earliest_ * weight) return;
    const double time = -std::log1p(-u) / weight;
    if (block_ >= 0 && !(time < earliest_)) return;
    earliest_ = time;
    block_ = block;
    uniform_ = open_uniform(bits.x[2], bits.x[3]);
  }

  int64_t block() const { return block_; }     // -1: none had any weight
  double uniform() const { return uniform_; }  // picks the token in the block

 private:
  const uint64_t seed_;
  const uint64_t key_;
  int64_t block_ = -1;
  double earliest_ = 0.0;
  double uniform_ = 0.0;
};

}  // namespace
}  // namespace winnow
