// From the sums of a row's slices to its statistics, its token and its divergence, a block per row.
#pragma once

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
  bool raw;  // statistics come before truncation
  Seed seed;
  Global<const int64_t> target;  // or null
};

// (0, 1), 64 bits, exact towards 0.
WINNOW_DEVICE double open_uniform(uint32_t low, uint32_t high) {
  const uint64_t bits = (static_cast<uint64_t>(high) << 32) | low;
  const double u = (static_cast<double>(bits) + 0.5) * 5.421010862427522e-20;
  return u < 0.99999999999999988898 ? u : 0.99999999999999988898;
}

// A slice's first arrival: slices compete in proportion to their mass.
struct Clock {
  double log_time;
  int64_t slice;
  double uniform;  // for the draw inside the slice
};

WINNOW_DEVICE Clock earlier(const Clock& a, const Clock& b) {
  if (a.slice < 0 || b.slice < 0) return a.slice < 0 ? b : a;
  if (a.log_time != b.log_time) return a.log_time < b.log_time ? a : b;
  return a.slice < b.slice ? a : b;
}

// The token of `slice` at which the cumulated weight exceeds uniform times the whole.
template <typename T, typename Real>
WINNOW_DEVICE int64_t draw_in_slice(const LogitView<T, Real>& view, int64_t row, int64_t slice,
                                    double reference, double temperature, double uniform,
                                    const Truncation& kept, Shared<uint32_t> bits,
                                    Shared<double> scratch, Shared<int64_t> index_scratch) {
  const Real top = static_cast<Real>(reference);
  const Real scale = exponent_scale<Real>(temperature);
  mark_suppressed(view, slice, bits);
  const int64_t first = slice * kSlice + thread_index() * kPerThread;
  const auto weight = [&](int64_t i) {
    if (i >= view.vocab || is_suppressed(view, bits, i - slice * kSlice)) return 0.0;
    const Real x = plain_logit(view, row, i);
    if (!keeps(kept, x, i)) return 0.0;
    return static_cast<double>(exp2_of(x == top ? Real(0) : (x - top) * scale));
  };
  double mine = 0.0;
  for (int e = 0; e < kPerThread; ++e) mine += weight(first + e);
  double all = 0.0;
  const double before = block_scan<kThreads>(mine, scratch, &all);
  const double target = uniform * all;
  // The last share that begins at or before the target: rounding never leaves it empty-handed.
  const int64_t owner = block_reduce<kThreads>(
      static_cast<int64_t>(mine > 0.0 && before <= target ? thread_index() : -1), index_scratch,
      [](int64_t a, int64_t b) { return a > b ? a : b; });
  int64_t token = -1;
  if (thread_index() == owner) {
    double left = target - before;
    for (int e = 0; e < kPerThread; ++e) {
      const double w = weight(first + e);
      if (!(w > 0.0)) continue;
      token = first + e;
      if (left < w) break;
      left -= w;
    }
  }
  return block_reduce<kThreads>(token, index_scratch,
                                [](int64_t a, int64_t b) { return a > b ? a : b; });
}

template <typename T, typename Real>
WINNOW_KERNEL(kThreads)
finish_rows(LogitView<T, Real> view, RowOptions options, Global<const SliceSums> slices,
            Global<const Truncation> truncations, Global<const Sums> kept_sums,
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
  const int64_t count = ceil_div<int64_t>(view.vocab, kSlice);
  const auto mine = slices + row * count;
  Distribution measured = merge_row(mine, count, options.temperature, Shared<TopTwo>(top_scratch),
                                    Shared<Sums>(sum_scratch));
  const double top = measured.top.first;
  const double infinity = std::numeric_limits<double>::infinity();
  const Real nan = std::numeric_limits<Real>::quiet_NaN();
  if (measured.top.nan != 0 || top == infinity || top == -infinity) {
    if (writes) {
      const bool infinite = measured.top.nan == 0 && top == infinity;
      out.fill(row, infinite ? measured.top.argmax : -1, infinite ? measured.top.argmax : -1, nan);
      if (measured.top.nan == 0) out.logsumexp[row] = static_cast<Real>(top);
    }
    return;
  }
  Truncation drawn_from = keep_all();
  Truncation described = keep_all();
  if (options.truncates) {
    drawn_from = truncations[row];
    if (!options.raw) {
      described = drawn_from;
      Sums sums = {0.0, 0.0, 0.0};
      for (int64_t s = thread_index(); s < count; s += kThreads) {
        const Sums slice = kept_sums[row * count + s];
        sums = add_sums(sums, slice);
      }
      sums = block_reduce<kThreads>(sums, Shared<Sums>(sum_scratch), add_sums);
      measured.mass = sums.mass;
      measured.moment = sums.moment;
    }
  }

  int64_t token = measured.top.argmax;
  if (options.draws) {
    Clock clock = {0.0, -1, 0.0};
    for (int64_t s = thread_index(); s < count; s += kThreads) {
      const SliceSums slice = mine[s];
      double log_mass = log(slice.sums.drawn) + (slice.top.first - top) / options.draw_temperature;
      if (options.truncates) {
        const Sums kept = kept_sums[row * count + s];
        log_mass = log(kept.drawn);
      }
      if (!(log_mass > -infinity)) continue;
      const Philox4 words = philox(options.seed.get(), static_cast<uint64_t>(view.key(row)),
                                   static_cast<uint64_t>(s * kSlice));
      const double arrival = -log1p(-open_uniform(words.x[0], words.x[1]));
      clock = earlier(clock, {log(arrival) - log_mass, s, open_uniform(words.x[2], words.x[3])});
    }
    clock = block_reduce<kThreads>(clock, Shared<Clock>(clock_scratch), earlier);
    double reference = top;
    if (!options.truncates) {
      const SliceSums slice = mine[clock.slice];
      reference = slice.top.first;
    }
    token = draw_in_slice(view, row, clock.slice, reference, options.draw_temperature,
                          clock.uniform, drawn_from, Shared<uint32_t>(bits),
                          Shared<double>(scan_scratch), Shared<int64_t>(index_scratch));
  }
  if (!writes) return;

  const double log_mass = log(measured.mass);
  const auto log_prob = [&](int64_t index) {
    const double x = logit_at(view, row, index);
    return keeps(described, x, index) ? (x - top) / options.temperature - log_mass : -infinity;
  };
  // The second largest is dropped with everything below the threshold; where it equals the largest
  // and the threshold, the first of the two may be the only one kept.
  double second = measured.top.second;
  if (second < described.threshold || (second == described.threshold && top == second &&
                                       described.last_tie <= measured.top.argmax)) {
    second = -infinity;
  }
  out.token[row] = token;
  out.argmax[row] = measured.top.argmax;
  out.log_prob[row] = static_cast<Real>(log_prob(token));
  out.max_prob[row] = static_cast<Real>(1.0 / measured.mass);
  out.margin[row] =
      static_cast<Real>((1.0 - exp((second - top) / options.temperature)) / measured.mass);
  out.entropy[row] = static_cast<Real>(log_mass - measured.moment / measured.mass);
  out.logsumexp[row] = static_cast<Real>(top / options.temperature + log_mass);
  if (options.target) {
    const int64_t target = options.target[row];
    out.target_log_prob[row] =
        target >= 0 && target < view.vocab ? static_cast<Real>(log_prob(target)) : nan;
  }
}

// Per slice, sum of exp(t) (t - u) over what is kept, t and u being (x - reference) / temperature
// of the row and of the same row of `previous`; infinite where the previous row has no mass.
template <typename T, typename Real>
WINNOW_KERNEL(kThreads)
cross_slices(LogitView<T, Real> view, LogitView<T, Real> previous, double temperature,
             Global<const SliceSums> slices, Global<const SliceSums> previous_slices,
             Global<const Truncation> truncations, Global<double> cross) {
  WINNOW_SHARED(uint32_t, bits, kThreads);
  WINNOW_SHARED(TopTwo, top_scratch, kThreads / kWarp);
  WINNOW_SHARED(Sums, sum_scratch, kThreads / kWarp);
  const int64_t row = block_index();
  const int64_t slice = block_index_y();
  if (skips(view, row)) return;
  const int64_t count = ceil_div<int64_t>(view.vocab, kSlice);
  const auto merge = [&](Global<const SliceSums> of) {
    return merge_row(of + row * count, count, temperature, Shared<TopTwo>(top_scratch),
                     Shared<Sums>(sum_scratch));
  };
  const double top = merge(slices).top.first;
  const double previous_top = merge(previous_slices).top.first;
  Truncation kept = keep_all();
  if (truncations) kept = truncations[row];

  constexpr int N = 16 / sizeof(T);
  mark_suppressed(view, slice, Shared<uint32_t>(bits));
  Real x[kPerThread];
  Real y[kPerThread];
  load_slice(view, row, slice, Shared<uint32_t>(bits), x);
  load_slice(previous, row, slice, Shared<uint32_t>(bits), y);
  const Real scale = exponent_scale<Real>(temperature);
  double sum = 0.0;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    if (!keeps(kept, x[e], slice * kSlice + within_slice<N>(e))) continue;
    const Real t = (x[e] - static_cast<Real>(top)) * scale;
    const Real weight = exp2_of(t);
    if (!(weight > Real(0))) continue;
    const Real u = (y[e] - static_cast<Real>(previous_top)) * scale;
    sum += static_cast<double>(weight) * (static_cast<double>(t) - static_cast<double>(u)) * kLn2;
  }
  const Sums all = block_reduce<kThreads>(Sums{sum, 0.0, 0.0}, Shared<Sums>(sum_scratch), add_sums);
  if (thread_index() == 0) cross[row * count + slice] = all.mass;
}

// KL(current || previous) from the cross terms and the two normalisers.
template <typename T, typename Real>
WINNOW_KERNEL(kThreads)
diverge_rows(LogitView<T, Real> view, double temperature, Global<const SliceSums> slices,
             Global<const SliceSums> previous_slices, Global<const Sums> kept_sums,
             Global<const double> cross, Global<Real> kl) {
  WINNOW_SHARED(TopTwo, top_scratch, kThreads / kWarp);
  WINNOW_SHARED(Sums, sum_scratch, kThreads / kWarp);
  const int64_t row = block_index();
  if (skips(view, row)) return;
  const int64_t count = ceil_div<int64_t>(view.vocab, kSlice);
  const auto merge = [&](Global<const SliceSums> of) {
    return merge_row(of + row * count, count, temperature, Shared<TopTwo>(top_scratch),
                     Shared<Sums>(sum_scratch));
  };
  const Distribution current = merge(slices);
  const Distribution previous = merge(previous_slices);
  Sums sums = {0.0, 0.0, 0.0};  // mass: of what is kept; moment: the cross terms
  for (int64_t s = thread_index(); s < count; s += kThreads) {
    sums.moment += cross[row * count + s];
    if (!kept_sums) continue;
    const Sums kept = kept_sums[row * count + s];
    sums.mass += kept.mass;
  }
  sums = block_reduce<kThreads>(sums, Shared<Sums>(sum_scratch), add_sums);
  const double infinity = std::numeric_limits<double>::infinity();
  const bool proper = current.top.nan == 0 && current.top.first < infinity &&
                      current.top.first > -infinity && previous.top.nan == 0 &&
                      previous.top.first < infinity;
  if (thread_index() != 0) return;
  const double mass = kept_sums ? sums.mass : current.mass;
  const double divergence = sums.moment / mass - log(mass) + log(previous.mass);
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
