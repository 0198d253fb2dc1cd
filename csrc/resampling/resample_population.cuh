// One population on the GPU, for a block of threads: what its parts of kBlock particles weigh, and
// the decision to resample. The parts may be one block's, one after another, or a block's each with
// a launch between the steps; what a step finds of a part lies in global memory.
#pragma once

#include "common/philox.h"
#include "resampling/resample_weigh.cuh"

namespace winnow {
namespace {

struct PartSums {
  double top;
  double sum;
  double squares;
  uint64_t total;
  int64_t nan;
};

template <typename T>
struct ResampleLaunch {
  using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
  Global<const T> log_weights;
  int64_t stride;
  int64_t particles;
  int64_t samples;
  Global<const uint8_t> mask;  // null: all live
  int64_t mask_stride;
  Global<const float> uniforms;  // both null: drawn from the seed
  Global<const double> wide_uniforms;
  int64_t uniforms_stride;
  Global<const int64_t> pinned;  // null: none
  Seed seed;
  uint64_t seed_number;  // where `seed` is none
  bool seed_given;
  Scheme scheme;
  double ess_threshold;
  bool keep_slots;
  Global<int64_t> ancestors;
  Global<uint64_t> offspring;
  Global<Real> new_log_weights;
  Global<Real> log_z;
  Global<Real> ess;
  Global<uint8_t> resampled;
  Global<int32_t> status;
  // Scratch: of each population, parts, weights (padded to 16), and three numbers per particle.
  int64_t parts;
  Global<PartSums> part;
  int64_t padded;
  Global<Real> weights;
  Global<uint64_t> cumulative;  // weights, or remainders
  Global<int64_t> ends;         // cumulative slots, or owners of remainders
  Global<int64_t> slots;        // of the live particles; null without mask
};

template <typename T, int kThreads>
struct PopulationBlock {
  using Real = typename ResampleLaunch<T>::Real;
  static constexpr int kSize = kThreads;
  const ResampleLaunch<T>& call;
  int64_t row;
  Shared<uint64_t> words;  // kThreads / 32 each
  Shared<double> numbers;
  int64_t live = 0;   // particles
  int64_t count = 0;  // samples
  int64_t pinned = -1;
  int32_t status = 0;
  bool resampled = false;
  double top = 0.0;
  double sum = 0.0;
  double log_z = 0.0;
  double ess = 0.0;
  double scale = 0.0;
  uint64_t total = 0;
  Forced forced = {};

  // ---- reductions; every thread gets the result ----

  WINNOW_DEVICE uint64_t sum_of(uint64_t value) const {
    return block_reduce<kThreads>(value, words, [](uint64_t a, uint64_t b) { return a + b; });
  }
  WINNOW_DEVICE uint64_t sum_before(uint64_t value, uint64_t* all) const {
    return block_scan<kThreads>(value, words, all);
  }

  // ---- the population's elements ----

  WINNOW_DEVICE int64_t slot(int64_t k) const {
    if (!call.slots) return k;
    const int64_t at = call.slots[row * call.particles + k];
    return at;
  }
  WINNOW_DEVICE Real log_weight(int64_t at) const {
    const T x = call.log_weights[row * call.stride + at];
    return static_cast<Real>(x);
  }
  WINNOW_DEVICE uint64_t fixed_weight(int64_t k) const {
    const Real weight = call.weights[row * call.padded + k];
    return static_cast<uint64_t>(static_cast<double>(weight) * scale);
  }
  WINNOW_DEVICE Global<uint64_t> cumulative() const {
    return call.cumulative + row * call.particles;
  }
  WINNOW_DEVICE Global<int64_t> ends() const { return call.ends + row * call.particles; }
  WINNOW_DEVICE Global<uint64_t> offspring() const { return call.offspring + row * call.particles; }
  WINNOW_DEVICE int64_t part_end(int64_t b) const {
    return (b + 1) * kBlock < live ? (b + 1) * kBlock : live;
  }
  WINNOW_DEVICE int64_t parts() const { return ceil_div<int64_t>(live, kBlock); }
  WINNOW_DEVICE PartSums part(int64_t b) const {
    const PartSums found = call.part[row * call.parts + b];
    return found;
  }

  // ---- uniforms ----

  WINNOW_DEVICE uint64_t drawn_bits(int64_t element) const {
    const uint64_t seed = call.seed_given ? call.seed.get() : call.seed_number;
    return philox_bits(seed, static_cast<uint64_t>(row), static_cast<uint64_t>(element));
  }
  WINNOW_DEVICE uint64_t uniform_bits(int64_t element) const {
    if (element == forced.element) return forced.bits;
    if (!call.uniforms && !call.wide_uniforms) return drawn_bits(element);
    double u;
    if (call.uniforms) {
      const float narrow = call.uniforms[row * call.uniforms_stride + element];
      u = static_cast<double>(narrow);
    } else {
      u = call.wide_uniforms[row * call.uniforms_stride + element];
    }
    if (!(u > 0.0)) return 0;
    return u < 1.0 ? static_cast<uint64_t>(u * 0x1p64) : ~uint64_t{0};
  }

  // ---- steps ----

  // The live particles and where the pinned one is among them.
  WINNOW_DEVICE void list_live() {
    live = call.particles;
    count = call.samples;
    if (call.pinned) {
      pinned = call.pinned[row];
      if (pinned < 0 || pinned >= live || pinned >= count) pinned = -1;
    }
    if (!call.mask) return;
    live = 0;
    uint64_t among = 0;  // one more than the pinned particle's rank
    for (int64_t first = 0; first < call.particles; first += kThreads) {
      const int64_t k = first + thread_index();
      uint8_t set = 0;
      if (k < call.particles) set = call.mask[row * call.mask_stride + k];
      uint64_t all;
      const int64_t rank =
          live + static_cast<int64_t>(sum_before(static_cast<uint64_t>(set != 0), &all));
      if (set != 0) call.slots[row * call.particles + rank] = k;
      if (set != 0 && k == pinned) among = static_cast<uint64_t>(rank) + 1;
      live += static_cast<int64_t>(all);
    }
    pinned = static_cast<int64_t>(sum_of(among)) - 1;
    count = live;
  }

  WINNOW_DEVICE void find_top(int64_t b) {
    double best = -std::numeric_limits<double>::infinity();
    uint64_t nan = 0;
    for (int64_t k = b * kBlock + thread_index(); k < part_end(b); k += kThreads) {
      const auto x = static_cast<double>(log_weight(slot(k)));
      if (x > best) best = x;
      if (x != x) nan = 1;
    }
    best = block_reduce<kThreads>(best, numbers, [](double a, double c) { return a > c ? a : c; });
    nan = sum_of(nan);
    if (thread_index() == 0) {
      call.part[row * call.parts + b] = PartSums{best, 0.0, 0.0, 0, nan != 0 ? 1 : 0};
    }
  }

  WINNOW_DEVICE void read_tops() {
    top = -std::numeric_limits<double>::infinity();
    uint64_t nan = 0;
    for (int64_t b = thread_index(); b < parts(); b += kThreads) {
      const PartSums found = part(b);
      if (found.top > top) top = found.top;
      nan += static_cast<uint64_t>(found.nan);
    }
    top = block_reduce<kThreads>(top, numbers, [](double a, double c) { return a > c ? a : c; });
    const double infinity = std::numeric_limits<double>::infinity();
    status = sum_of(nan) != 0 ? kStatusNan : 0;
    if (live == 0) {
      status |= kStatusNothingLive;
    } else if (top == infinity) {
      status |= kStatusInfinite;
    } else if (top == -infinity) {
      status |= kStatusNoWeight;
    }
  }
  WINNOW_DEVICE bool weightless() const {
    return (status & (kStatusNoWeight | kStatusNothingLive)) != 0;
  }

  WINNOW_DEVICE void weigh(int64_t b) {
    if (weightless()) return;
    const Global<Real> weights = call.weights + row * call.padded;
    for (int64_t k = b * kBlock + thread_index(); k < part_end(b); k += kThreads) {
      weights[k] = weight_of(log_weight(slot(k)), static_cast<Real>(top));
    }
    block_sync();
    if (warp_index() != 0) return;
    double part_sum;
    double squares;
    ordered_sums<Real>(weights + b * kBlock, part_end(b) - b * kBlock, &part_sum, &squares);
    if (lane_index() == 0) {
      PartSums found = part(b);
      found.sum = part_sum;
      found.squares = squares;
      call.part[row * call.parts + b] = found;
    }
  }

  WINNOW_DEVICE void decide() {
    if (weightless()) return;
    sum = 0.0;
    double squares = 0.0;
    for (int64_t b = 0; b < parts(); ++b) {  // in order: every thread the same sums
      const PartSums found = part(b);
      sum += found.sum;
      squares += found.squares;
    }
    ess = sum * sum / squares;
    resampled = call.ess_threshold < 0 || ess < call.ess_threshold * static_cast<double>(live);
    if (!resampled) return;
    log_z = log_number(sum / static_cast<double>(live)) + top;
    const int64_t exponent = (bits_as<int64_t>(sum) >> 52) - 1023;
    scale = bits_as<double>((59 - exponent + 1023) << 52);
  }

  WINNOW_DEVICE void add_up(int64_t b) {
    if (!resampled) return;
    if (pinned >= b * kBlock && pinned < part_end(b)) {  // one without weight gets the least
      if (thread_index() == 0) {
        const Real least = static_cast<Real>(1.0 / scale);
        const Real weight = call.weights[row * call.padded + pinned];
        if (weight < least) call.weights[row * call.padded + pinned] = least;
      }
      block_sync();
    }
    uint64_t part_total = 0;
    for (int64_t k = b * kBlock + thread_index(); k < part_end(b); k += kThreads) {
      part_total += fixed_weight(k);
    }
    part_total = sum_of(part_total);
    if (thread_index() == 0) {
      PartSums found = part(b);
      found.total = part_total;
      call.part[row * call.parts + b] = found;
    }
  }

  // Sum of the totals of the parts before b; that of all into `total`.
  WINNOW_DEVICE uint64_t read_totals(int64_t b) {
    uint64_t before = 0;
    uint64_t all = 0;
    for (int64_t i = thread_index(); i < parts() && resampled; i += kThreads) {
      const PartSums found = part(i);
      all += found.total;
      if (i < b) before += found.total;
    }
    total = sum_of(all);
    return sum_of(before);
  }

  // take(particle, weight, sum of the weights before it) for particles [begin, end), by a thread
  // each; returns the sum behind them.
  template <typename Take>
  WINNOW_DEVICE uint64_t each_cumulative(int64_t begin, int64_t end, uint64_t before,
                                         const Take& take) const {
    for (int64_t first = begin; first < end; first += kThreads) {
      const int64_t k = first + thread_index();
      const uint64_t weight = k < end ? fixed_weight(k) : 0;
      uint64_t all;
      const uint64_t mine = before + sum_before(weight, &all);
      if (k < end) take(k, weight, mine);
      before += all;
    }
    return before;
  }

  // The total of the weights below `threshold` before the pinned particle.
  WINNOW_DEVICE uint64_t total_before_pinned(uint64_t threshold) const {
    uint64_t before = 0;
    for (int64_t k = thread_index(); k < pinned; k += kThreads) {
      const uint64_t weight = fixed_weight(k);
      if (weight < threshold) before += weight;
    }
    return sum_of(before);
  }

  WINNOW_DEVICE void decide_by_pinned() {
    if (pinned < 0 || call.scheme == Scheme::kKilling) return;
    forced = force(call.scheme, pinned, count, fixed_weight(pinned),
                   total_before_pinned(~uint64_t{0}), total, drawn_bits(kPinnedPoint));
  }
};

}  // namespace
}  // namespace winnow
