// From the sums of a row's blocks to its statistics, its token and its divergence, a thread block
// per row.
#pragma once

#include "unmasking/logit_draw.h"
#include "unmasking/logit_truncation_kernel.cuh"

namespace winnow {
namespace {

template <typename Real>
struct RowOutputs {
  Global<int64_t> token;
  Global<Real> log_prob;
  Global<int64_t> argmax;
  Global<Real> max_prob;
  Global<Real> margin;
  Global<Real> entropy;
  Global<Real> logsumexp;
  Global<Real> target_log_prob;  // or null
  Global<Real> kl;               // or null; written by diverge_rows, but for rows without one

  // token, argmax, and the rest alike.
  WINNOW_DEVICE void fill(int64_t row, int64_t no_token, int64_t no_argmax, Real value) const {
    token[row] = no_token;
    argmax[row] = no_argmax;
    log_prob[row] = value;
    max_prob[row] = value;
    margin[row] = value;
    entropy[row] = value;
    logsumexp[row] = value;
    if (target_log_prob) target_log_prob[row] = value;
    if (kl) kl[row] = value;
  }
};

struct RowOptions {
  double temperature;
  double draw_temperature;
  bool draws;
  bool truncates;
  bool raw;      // statistics come before truncation
  bool is_part;  // of a vocabulary
  Seed seed;
  Global<const int64_t> target;  // or null
};

// A block's first arrival: blocks compete in proportion to their mass.
struct Clock {
  double log_time;
  int64_t block;
  double uniform;  // for the draw inside the block
};

WINNOW_DEVICE Clock clock_of(const Seed& seed, int64_t key, uint64_t element, int64_t block,
                             double log_mass) {
  const Philox4 words = philox(seed.get(), static_cast<uint64_t>(key), element);
  const double arrival = -log1p(-open_uniform(words.x[0], words.x[1]));
  return {log(arrival) - log_mass, block, open_uniform(words.x[2], words.x[3])};
}

WINNOW_DEVICE Clock earlier(const Clock& a, const Clock& b) {
  if (a.block < 0 || b.block < 0) return a.block < 0 ? b : a;
  if (a.log_time != b.log_time) return a.log_time < b.log_time ? a : b;
  return a.block < b.block ? a : b;
}

// The race of blocks first to end - 1, of which block 0 is at `place` of the whole vocabulary's
// grid. A block of log_mass -infinity has no part in it. Every thread gets the winner; -1 without
// one.
template <typename LogMass>
WINNOW_DEVICE Clock race_blocks(const Seed& seed, int64_t key, int64_t place, int64_t first,
                                int64_t end, const LogMass& log_mass, Shared<Clock> scratch) {
  Clock clock = {0.0, -1, 0.0};
  for (int64_t b = first + thread_index(); b < end; b += kThreads) {
    const double mass = log_mass(b);
    if (!(mass > -std::numeric_limits<double>::infinity())) continue;
    const auto element = static_cast<uint64_t>((place + b) * kLogitBlock);
    clock = earlier(clock, clock_of(seed, key, element, b, mass));
  }
  return block_reduce<kThreads>(clock, scratch, earlier);
}

// Of the kThreads * kShare indices from `first` on, the one at which the cumulated weight exceeds
// uniform times the whole; -1 where nothing has any weight.
template <int kShare, typename Weight>
WINNOW_DEVICE int64_t draw_index(int64_t first, double uniform, const Weight& weight,
                                 Shared<double> scratch, Shared<int64_t> index_scratch) {
  const auto larger = [](int64_t a, int64_t b) { return a > b ? a : b; };
  const int64_t own = first + thread_index() * kShare;
  double mine = 0.0;
  for (int e = 0; e < kShare; ++e) mine += weight(own + e);
  double all = 0.0;
  const double before = block_scan<kThreads>(mine, scratch, &all);
  const double target = uniform * all;
  // The last share that begins at or before the target: rounding never leaves it empty-handed.
  const int64_t owner = block_reduce<kThreads>(
      static_cast<int64_t>(mine > 0.0 && before <= target ? thread_index() : -1), index_scratch,
      larger);
  int64_t index = -1;
  if (thread_index() == owner) {
    double left = target - before;
    for (int e = 0; e < kShare; ++e) {
      const double w = weight(own + e);
      if (!(w > 0.0)) continue;
      index = own + e;
      if (left < w) break;
      left -= w;
    }
  }
  return block_reduce<kThreads>(index, index_scratch, larger);
}

// A token of a block, by its index in the row.
template <typename Real>
WINNOW_DEVICE int64_t draw_in_block(const LogitView<Real>& view, int64_t row, int64_t block,
                                    double reference, double temperature, double uniform,
                                    const KeptRange& kept, Shared<uint32_t> bits,
                                    Shared<double> scratch, Shared<int64_t> index_scratch) {
  const Real top = static_cast<Real>(reference);
  const Real scale = exponent_scale<Real>(temperature);
  const int64_t slice = block / kSliceBlocks;
  mark_suppressed(view, slice, bits);
  const auto weight = [&](int64_t i) {
    if (i < 0 || i >= view.vocab) return 0.0;
    if (is_suppressed(view, bits, i + view.offset() - slice * kSlice)) return 0.0;
    const Real x = plain_logit(view, row, i);
    if (!keeps(kept, x, i)) return 0.0;
    return static_cast<double>(exp2_of((x - top) * scale));
  };
  return draw_index<kLogitBlock / kThreads>(block * kLogitBlock - view.offset(), uniform, weight,
                                            scratch, index_scratch);
}

// Whether a row has a distribution; if not, what it gets instead is written.
template <typename Real>
WINNOW_DEVICE bool is_described(const TopTwo& top, const RowOutputs<Real>& out, int64_t row) {
  if (is_proper(top)) return true;
  if (thread_index() == 0) {
    const int64_t id = top.nan == 0 && top.first > 0.0 ? top.argmax : -1;
    out.fill(row, id, id, std::numeric_limits<Real>::quiet_NaN());
    if (top.nan == 0) out.logsumexp[row] = static_cast<Real>(top.first);
  }
  return false;
}

// What follows from the distribution alone, `second` being the second largest logit in it.
template <typename Real>
WINNOW_DEVICE void describe(const Distribution& measured, double second, double temperature,
                            const RowOutputs<Real>& out, int64_t row) {
  const double top = measured.top.first;
  const double log_mass = log(measured.mass);
  out.argmax[row] = measured.top.argmax;
  out.max_prob[row] = static_cast<Real>(1.0 / measured.mass);
  out.margin[row] = static_cast<Real>((1.0 - exp((second - top) / temperature)) / measured.mass);
  out.entropy[row] = static_cast<Real>(log_mass - measured.moment / measured.mass);
  out.logsumexp[row] = static_cast<Real>(top / temperature + log_mass);
}

// A block's share of a draw, relative to the row's largest logit.
WINNOW_DEVICE double log_drawn(const SliceSums& block, double top, double temperature) {
  return log(block.sums.drawn) + (block.top.first - top) / temperature;
}

template <typename Real>
WINNOW_KERNEL(kThreads)
finish_rows(LogitView<Real> view, RowOptions options, Global<const SliceSums> blocks,
            Global<const KeptRange> truncations, Global<const Sums> kept_sums,
            RowOutputs<Real> out) {
  WINNOW_SHARED(uint32_t, bits, kThreads);
  WINNOW_SHARED(TopTwo, top_scratch, kThreads / kWarp);
  WINNOW_SHARED(Sums, sum_scratch, kThreads / kWarp);
  WINNOW_SHARED(Clock, clock_scratch, kThreads / kWarp);
  WINNOW_SHARED(double, scan_scratch, kThreads / kWarp);
  WINNOW_SHARED(int64_t, index_scratch, kThreads / kWarp);
  const int64_t row = block_index();
  const bool writes = thread_index() == 0;
  if (skips(view, row)) {
    if (writes) out.fill(row, -1, 0, Real(0));
    return;
  }
  const int64_t count = view.blocks();
  const auto mine = blocks + row * count;
  Distribution measured = merge_row(mine, count, options.temperature, Shared<TopTwo>(top_scratch),
                                    Shared<Sums>(sum_scratch));
  if (!is_described(measured.top, out, row)) return;
  const double top = measured.top.first;
  const double infinity = std::numeric_limits<double>::infinity();
  KeptRange drawn_from = keep_all();
  KeptRange described = keep_all();
  if (options.truncates) {
    drawn_from = truncations[row];
    if (!options.raw) {
      described = drawn_from;
      const Sums sums = sum_kept(kept_sums + row * count, count, Shared<Sums>(sum_scratch));
      measured.mass = sums.mass;
      measured.moment = sums.moment;
    }
  }

  int64_t token = measured.top.argmax - view.start;  // in the row
  if (options.draws) {
    const auto log_mass = [&](int64_t b) {
      if (options.truncates) {
        const Sums kept = kept_sums[row * count + b];
        return log(kept.drawn);
      }
      const SliceSums block = mine[b];
      return log_drawn(block, top, options.draw_temperature);
    };
    const Clock clock = race_blocks(options.seed, view.key(row), view.start / kLogitBlock, 0, count,
                                    log_mass, Shared<Clock>(clock_scratch));
    double reference = top;
    if (!options.truncates) {
      const SliceSums block = mine[clock.block];
      reference = block.top.first;
    }
    token = draw_in_block(view, row, clock.block, reference, options.draw_temperature,
                          clock.uniform, drawn_from, Shared<uint32_t>(bits),
                          Shared<double>(scan_scratch), Shared<int64_t>(index_scratch));
  }
  if (!writes) return;

  const auto log_prob = [&](int64_t index) {
    const double x = logit_at(view, row, index);
    return keeps(described, x, index) ? (x - top) / options.temperature - log(measured.mass)
                                      : -infinity;
  };
  // The second largest is dropped with everything below the threshold; where it equals the largest
  // and the threshold, the first of the two may be the only one kept.
  double second = measured.top.second;
  if (second < described.threshold || (second == described.threshold && top == second &&
                                       described.last_tie <= measured.top.argmax)) {
    second = -infinity;
  }
  describe(measured, second, options.temperature, out, row);
  out.token[row] = view.start + token;
  out.log_prob[row] = static_cast<Real>(log_prob(token));
  if (options.target) {
    const int64_t id = options.target[row];
    const int64_t target = id - view.start;
    Real value = std::numeric_limits<Real>::quiet_NaN();
    if (target >= 0 && target < view.vocab) {
      value = static_cast<Real>(log_prob(target));
    } else if (options.is_part && id >= 0) {
      value = static_cast<Real>(-infinity);
    }
    out.target_log_prob[row] = value;
  }
}

// Per block, sum of exp(t) (t - u) over what is kept, t and u being (x - reference) / temperature
// of the row's block and of the same block of `previous`, each with its own largest logit; infinite
// where the previous one has no mass. `stride` as in scan_blocks.
template <typename Real>
WINNOW_KERNEL(kThreads)
cross_blocks(LogitView<Real> view, LogitView<Real> previous, double temperature,
             Global<const SliceSums> blocks, Global<const SliceSums> previous_blocks,
             Global<const KeptRange> truncations, Global<double> cross, int64_t stride) {
  WINNOW_SHARED(uint32_t, bits, kThreads);
  const int64_t row = block_index();
  const int64_t slice = block_index_y();
  if (skips(view, row)) return;
  KeptRange kept = keep_all();
  if (truncations) kept = truncations[row];

  mark_suppressed(view, slice, Shared<uint32_t>(bits));
  Real x[kPerThread];
  Real y[kPerThread];
  load_slice(view, row, slice, Shared<uint32_t>(bits), x);
  load_slice(previous, row, slice, Shared<uint32_t>(bits), y);
  const int64_t block = slice * kSliceBlocks + warp_index();
  if (block >= view.blocks()) return;  // the whole warp
  const SliceSums own = blocks[row * stride + block];
  const SliceSums before = previous_blocks[row * stride + block];
  const double infinity = std::numeric_limits<double>::infinity();
  double sum = 0.0;
  if (!(own.sums.mass > 0.0)) {
    sum = 0.0;
  } else if (before.top.first == -infinity) {
    sum = infinity;
  } else {
    const Real scale = exponent_scale<Real>(temperature);
    const int64_t first = slice * kSlice - view.offset();
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      if (!keeps(kept, x[e], first + within_slice<Real>(e))) continue;
      const Real t = (x[e] - static_cast<Real>(own.top.first)) * scale;
      const Real weight = exp2_of(t);
      if (!(weight > Real(0))) continue;
      const Real u = (y[e] - static_cast<Real>(before.top.first)) * scale;
      sum += static_cast<double>(weight) * (static_cast<double>(t) - static_cast<double>(u)) * kLn2;
    }
    sum = warp_reduce(sum, [](double a, double b) { return a + b; });
  }
  if (lane_index() == 0) cross[row * stride + block] = static_cast<Real>(sum);
}

// KL(current || previous) from the blocks' sums and cross terms.
template <typename Real>
WINNOW_KERNEL(kThreads)
diverge_rows(LogitView<Real> view, double temperature, Global<const SliceSums> blocks,
             Global<const SliceSums> previous_blocks, Global<const Sums> kept_sums,
             Global<const double> cross, Global<Real> kl) {
  WINNOW_SHARED(TopTwo, top_scratch, kThreads / kWarp);
  WINNOW_SHARED(Sums, sum_scratch, kThreads / kWarp);
  const int64_t row = block_index();
  if (skips(view, row)) return;
  const int64_t count = view.blocks();
  const auto merge = [&](Global<const SliceSums> of) {
    return merge_row(of + row * count, count, temperature, Shared<TopTwo>(top_scratch),
                     Shared<Sums>(sum_scratch));
  };
  const Distribution current = merge(blocks);
  const Distribution previous = merge(previous_blocks);
  Sums sums = {0.0, 0.0, 0.0};  // mass: of what is kept; moment: what is summed over it
  for (int64_t b = thread_index(); b < count; b += kThreads) {
    const SliceSums own = blocks[row * count + b];
    const double shift = own.top.first - current.top.first;
    const double weight = exp(shift / temperature);
    double mass = weight * own.sums.mass;
    if (kept_sums) {
      const Sums kept = kept_sums[row * count + b];
      mass = kept.mass;
    }
    if (!(mass > 0.0)) continue;
    const SliceSums before = previous_blocks[row * count + b];
    const double apart = shift - (before.top.first - previous.top.first);
    const double term = cross[row * count + b];
    sums.mass += mass;
    sums.moment += weight * term + apart / temperature * mass;
  }
  sums = block_reduce<kThreads>(sums, Shared<Sums>(sum_scratch), add_sums);
  const double infinity = std::numeric_limits<double>::infinity();
  // Without any mass the previous row is infinitely far.
  const bool proper =
      is_proper(current.top) && previous.top.nan == 0 && previous.top.first < infinity;
  if (thread_index() != 0) return;
  const double divergence = sums.moment / sums.mass - log(sums.mass) + log(previous.mass);
  const Real nan = std::numeric_limits<Real>::quiet_NaN();
  if (!proper) {
    kl[row] = nan;
  } else if (previous.top.first == -infinity) {
    kl[row] = static_cast<Real>(infinity);
  } else {
    kl[row] = static_cast<Real>(divergence > 0.0           ? divergence
                                : divergence != divergence ? nan
                                                           : 0.0);
  }
}

}  // namespace
}  // namespace winnow
