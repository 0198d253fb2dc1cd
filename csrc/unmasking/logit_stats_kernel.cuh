// The kernels of winnow::logit_stats. A thread block holds a slice of a row in registers, each warp
// a block of the vocabulary's grid: one read of the logits gives its maximum and then the sums
// relative to it, with no barrier. Blocks merge exactly; a second kernel, a thread block per row,
// merges them and draws the token. Rows that the mask leaves out are never read. The blocks and the
// keys of their clocks are those of the CPU, so that a seed draws the same token there, up to
// rounding.
#pragma once

#include <cmath>

#include "common/philox.h"
#include "unmasking/logit_view.cuh"

namespace winnow {
namespace {

WINNOW_DEVICE float exp2_of(float x) {
  return fast_exp2(x);
}
WINNOW_DEVICE double exp2_of(double x) {
  return exp2(x);
}

// The two largest of a set, and where the first one is; of equal ones the lowest index.
struct TopTwo {
  double first;
  double second;
  int64_t argmax;
  int64_t nan;
};

WINNOW_DEVICE TopTwo no_top() {
  const double none = -std::numeric_limits<double>::infinity();
  return {none, none, -1, 0};
}

WINNOW_DEVICE TopTwo merge_tops(const TopTwo& a, const TopTwo& b) {
  const bool a_wins =
      a.first > b.first ||
      (a.first == b.first && (b.argmax < 0 || (a.argmax >= 0 && a.argmax < b.argmax)));
  const TopTwo& winner = a_wins ? a : b;
  const TopTwo& other = a_wins ? b : a;
  return {winner.first, other.first > winner.second ? other.first : winner.second, winner.argmax,
          a.nan | b.nan};
}

// Whether a row with these has a distribution: no NaN, and its largest logit is finite.
WINNOW_DEVICE bool is_proper(const TopTwo& top) {
  const double infinity = std::numeric_limits<double>::infinity();
  return top.nan == 0 && top.first < infinity && top.first > -infinity;
}

// Sums over t = (x - reference) / temperature, in nats.
struct Sums {
  double mass;    // of exp(t)
  double moment;  // of t exp(t)
  double drawn;   // of exp(t) at the temperature of the draw
};

WINNOW_DEVICE Sums add_sums(const Sums& a, const Sums& b) {
  return {a.mass + b.mass, a.moment + b.moment, a.drawn + b.drawn};
}

// What is kept of a slice or of a block; the sums are relative to top.first.
struct SliceSums {
  TopTwo top;
  Sums sums;
};

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// Finite and not 0, so that 0 stays 0 and infinity infinite.
template <typename Real>
WINNOW_DEVICE Real exponent_scale(double temperature) {
  const double scale = kLog2E / temperature;
  const double largest = std::numeric_limits<Real>::max();
  const double smallest = std::numeric_limits<Real>::min();
  return static_cast<Real>(scale < smallest ? smallest : scale < largest ? scale : largest);
}

// The sums of every block; `stride` apart for the next row. argmax is an id of the whole
// vocabulary.
template <typename Real>
WINNOW_KERNEL(kThreads)
scan_blocks(LogitView<Real> view, double temperature, double draw_temperature,
            Global<SliceSums> blocks, int64_t stride) {
  WINNOW_SHARED(uint32_t, bits, kThreads);
  const int64_t row = block_index();
  const int64_t slice = block_index_y();
  if (skips(view, row)) return;
  mark_suppressed(view, slice, Shared<uint32_t>(bits));
  Real x[kPerThread];
  load_slice(view, row, slice, Shared<uint32_t>(bits), x);

  const Real none = -std::numeric_limits<Real>::infinity();
  Real first = none;
  Real second = none;
  int at = -1;
  bool nan = false;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    nan = nan || x[e] != x[e];
    if (x[e] > first) {
      second = first;
      first = x[e];
      at = e;
    } else if (x[e] > second) {
      second = x[e];
    }
  }
  const int64_t slice_id = view.start - view.offset() + slice * kSlice;
  TopTwo top = {first, second, at < 0 ? -1 : slice_id + within_slice<Real>(at), nan};
  top = warp_reduce(top, merge_tops);

  Real mass = Real(0);
  Real moment = Real(0);
  Real drawn = Real(0);
  const Real reference = static_cast<Real>(top.first);
  if (reference != none && reference != -none) {
    const Real scale = exponent_scale<Real>(temperature);
    const Real draw_scale = exponent_scale<Real>(draw_temperature);
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      const Real t = (x[e] - reference) * scale;
      const Real weight = exp2_of(t);
      mass += weight;
      if (weight > Real(0)) moment = fma(t, weight, moment);
      if (draw_temperature != temperature) {
        drawn += exp2_of((x[e] - reference) * draw_scale);
      }
    }
    if (draw_temperature == temperature) drawn = mass;
  }
  Sums sums = warp_reduce(Sums{mass, moment, drawn}, add_sums);
  // Rounded as they travel between parts of a vocabulary: merged or whole, the bits are the same.
  sums = {static_cast<Real>(sums.mass), static_cast<Real>(sums.moment) * kLn2,
          static_cast<Real>(sums.drawn)};
  const int64_t block = slice * kSliceBlocks + warp_index();
  if (lane_index() == 0 && block < view.blocks()) {
    blocks[row * stride + block] = SliceSums{top, sums};
  }
}

// The whole of what is kept of a row, which every thread of the block gets.
WINNOW_DEVICE Sums sum_kept(Global<const Sums> kept, int64_t count, Shared<Sums> scratch) {
  Sums sums = {0.0, 0.0, 0.0};
  for (int64_t b = thread_index(); b < count; b += kThreads) {
    const Sums own = kept[b];
    sums = add_sums(sums, own);
  }
  return block_reduce<kThreads>(sums, scratch, add_sums);
}

// One row's distribution; the sums are relative to top.first.
struct Distribution {
  TopTwo top;
  double mass;
  double moment;
};

// Every thread of the block gets it.
WINNOW_DEVICE Distribution merge_row(Global<const SliceSums> slices, int64_t count,
                                     double temperature, Shared<TopTwo> top_scratch,
                                     Shared<Sums> sum_scratch) {
  TopTwo top = no_top();
  for (int64_t s = thread_index(); s < count; s += kThreads) {
    const SliceSums slice = slices[s];
    top = merge_tops(top, slice.top);
  }
  top = block_reduce<kThreads>(top, top_scratch, merge_tops);
  Sums sums = {0.0, 0.0, 0.0};
  for (int64_t s = thread_index(); s < count; s += kThreads) {
    const SliceSums slice = slices[s];
    const double shift = (slice.top.first - top.first) / temperature;
    const double weight = exp(shift);
    if (!(weight > 0.0)) continue;
    sums.mass += weight * slice.sums.mass;
    sums.moment += weight * (slice.sums.moment + shift * slice.sums.mass);
  }
  sums = block_reduce<kThreads>(sums, sum_scratch, add_sums);
  return {top, sums.mass, sums.moment};
}

}  // namespace
}  // namespace winnow
