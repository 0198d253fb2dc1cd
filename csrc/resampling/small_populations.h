// Resampling of populations of at most 16 particles, sixteen populations at a time: lane l of every
// vector belongs to population l. The same operations in the same order as for a large
// population, so a population's result does not depend on the path; what a population of four costs
// otherwise is mostly the steps between.
#pragma once

#include <cstdint>
#include <limits>

#include "resampling/small_schemes.h"
#include "resampling/spread.h"
#include "resampling/weigh.h"

namespace winnow {
namespace {

inline bool is_small(const ResampleCall& call) {
  return call.particles > 0 && call.particles <= kSmallParticles &&
         call.samples == call.particles && call.scheme != Scheme::kOptimal &&
         call.mask == nullptr && call.uniforms == nullptr && call.pinned == nullptr;
}

// kWide populations: sums in the order of sum_wide(block_sums), fixed-point weights cumulated.
template <int kMost>
inline f64x8 lanes_sum(const f64x8* w) {
  // Beyond kMost every term is zero, and adding it changes nothing.
  const auto pair = [&](int i) { return kMost > 8 ? w[i] + w[i + 8] : w[i]; };
  if (kMost == 4) return (w[0] + w[2]) + (w[1] + w[3]);
  return ((pair(0) + pair(4)) + (pair(2) + pair(6))) + ((pair(1) + pair(5)) + (pair(3) + pair(7)));
}

inline i32x16 load_integers(const int32_t* from) {
  i32x16 v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// Reads n populations; the lanes beyond hold zeros.
template <int kMost, bool kExact, typename T>
inline void load_small(const T* from, int64_t stride, int64_t particles, int64_t n,
                       SmallPopulations* s) {
  const int64_t k = kExact ? kMost : particles;
  const int64_t size = n * k;
  if (stride == k && n == kLanes) {
    for (int64_t i = 0; i < k; ++i) {
      store_lanes(s->rows + i * kLanes, load_lanes(from + i * kLanes));
    }
  } else {
    for (int64_t l = 0; l < n; ++l) {
      store_lanes(s->rows + l * k, load_lanes(from + l * stride, k, 0.0f));
    }
  }
  for (int64_t i = size; i < kLanes * k; ++i) s->rows[i] = 0.0f;
  for (int64_t l = 0; l < kLanes; ++l) {
    for (int64_t i = 0; i < k; ++i) s->x[i][l] = s->rows[l * k + i];
  }
}

template <int kMost>
__attribute__((flatten)) inline void weigh_small(int64_t k, SmallPopulations* s) {
  const float infinity = std::numeric_limits<float>::infinity();
  f32x16 top = -infinity;
  i32x16 nan = 0;
  for (int64_t i = 0; i < k; ++i) {
    const f32x16 x = load_lanes(s->x[i]);
    top = max_lanes(x, top);
    nan = nan | (x != x);
  }
  const i32x16 dead = top == f32x16(-infinity);
  const i32x16 infinite = top == f32x16(infinity);
  store_lanes(s->top, top);
  std::memcpy(s->dead, &dead, sizeof dead);
  std::memcpy(s->nan, &nan, sizeof nan);
  const i32x16 one = as_bits(f32x16(1.0f));
  const bool special = any(dead | infinite);
  for (int64_t i = 0; i < kMost; ++i) {
    if (i >= k) {
      store_lanes(s->w[i], 0.0f);
      continue;
    }
    const f32x16 x = load_lanes(s->x[i]);
    i32x16 w = (x == x) & as_bits(exp_lanes(x - top));
    if (special) {
      w = select(infinite, (x == top) & one, w);
      // A population without weight goes along as if its first particle had some.
      w = select(dead, i == 0 ? one : i32x16(0), w);
    }
    store_lanes(s->w[i], as_float(w));
  }
}

// Every count again, in integers.
inline void exact_small(const ResampleCall& call, int h, const u64x8* cumulative,
                        const u64x8& total, const u64x8& offset, SmallPopulations* s) {
  uint64_t totals[kWide];
  uint64_t offsets[kWide];
  std::memcpy(totals, &total, sizeof total);
  std::memcpy(offsets, &offset, sizeof offset);
  for (int64_t i = 0; i < call.particles; ++i) {
    uint64_t weights[kWide];
    std::memcpy(weights, &cumulative[i], sizeof weights);
    for (int l = 0; l < kWide; ++l) {
      int32_t* count = &s->counts[i][h * kWide + l];
      *count = static_cast<int32_t>(
          systematic_exact(make_grid(call.particles, totals[l], offsets[l]), weights[l], *count));
    }
  }
}

// ESS, log Z and the decision; whether any population is resampled.
template <int kMost>
inline bool decide_small(const ResampleCall& call, SmallPopulations* s) {
  const auto particles = static_cast<double>(call.particles);
  const double below = call.ess_threshold < 0 ? std::numeric_limits<double>::infinity()
                                              : call.ess_threshold * particles;
  for (int h = 0; h < 2; ++h) {
    f64x8 w[kMost];
    f64x8 squares[kMost];
    for (int i = 0; i < kMost; ++i) {
      w[i] = load_wide(s->w[i] + h * kWide);
      squares[i] = w[i] * w[i];
    }
    const f64x8 sum = lanes_sum<kMost>(w);
    const f64x8 square_sum = lanes_sum<kMost>(squares);
    f64x8 mean;
    for (int p = 0; p < kParts; ++p) mean.part[p] = sum.part[p] / particles;
    const f64x8 log_z = log_wide(mean) + load_wide(s->top + h * kWide);
    for (int p = 0; p < kParts; ++p) {
      const int at = h * kWide + p * (kWide / kParts);
      const DoublePart ess = sum.part[p] * sum.part[p] / square_sum.part[p];
      const LongPart exponent = ((LongPart)sum.part[p] >> 52) - 1023;
      const DoublePart scale = (DoublePart)((59 - exponent + 1023) << 52);
      const IntHalf triggered = __builtin_convertvector((LongPart)(ess < below), IntHalf);
      const FloatHalf narrow_ess = __builtin_convertvector(ess, FloatHalf);
      const FloatHalf narrow_log_z = __builtin_convertvector(log_z.part[p], FloatHalf);
      std::memcpy(s->scale + at, &scale, sizeof scale);
      std::memcpy(s->ess + at, &narrow_ess, sizeof narrow_ess);
      std::memcpy(s->log_z + at, &narrow_log_z, sizeof narrow_log_z);
      std::memcpy(s->resampled + at, &triggered, sizeof triggered);
    }
  }
  const i32x16 live = load_integers(s->dead) ^ i32x16(-1);
  const i32x16 resampled = load_integers(s->resampled) & live;
  std::memcpy(s->resampled, &resampled, sizeof resampled);
  store_lanes(s->ess, as_float(as_bits(load_lanes(s->ess)) & live));
  store_lanes(s->log_z, as_float(as_bits(load_lanes(s->log_z)) & resampled));
  return any(resampled);
}

// Cumulative counts of populations [8 h, 8 h + 8).
template <int kMost>
inline void count_small(const ResampleCall& call, int64_t row, int h, SmallPopulations* s) {
  const int64_t k = call.particles;
  const auto particles = static_cast<double>(k);
  const f64x8 scale = load_wide(s->scale + h * kWide);
  u64x8 cumulative[kMost];
  u64x8 total = wide_word(0);
  for (int i = 0; i < kMost; ++i) {
    if (i >= k) break;
    const u64x8 q = to_words(load_wide(s->w[i] + h * kWide) * scale);
    for (int p = 0; p < kParts; ++p) total.part[p] += q.part[p];
    cumulative[i] = total;
  }
  if (call.scheme == Scheme::kSsp) {
    return pair_small<kMost>(call, row, h, cumulative, total, s);
  }
  if (call.scheme != Scheme::kSystematic) {
    return draw_small<kMost>(call, row, h, cumulative, total, s);
  }
  const u64x8 bits =
      philox_wide(call.seed, count_from(static_cast<uint64_t>(row + h * kWide)), wide_word(0));
  const u64x8 offset = multiply_high(bits, total);
  const f64x8 all = to_double(total);
  const f64x8 start = to_double(offset);
  const double near = near_tie(k);
  LongPart ties = {};
  for (int p = 0; p < kParts; ++p) {
    const DoublePart inverse = 1.0 / all.part[p];
    const DoublePart ratio = particles * inverse;
    const DoublePart shift = start.part[p] * inverse;
    for (int i = 0; i < kMost; ++i) {
      if (i >= k) break;
      const DoublePart c = to_double(cumulative[i].part[p]);
      const LongPart count = count_part(c * ratio - shift, near, &ties);
      const IntHalf narrow = __builtin_convertvector(count, IntHalf);
      std::memcpy(s->counts[i] + h * kWide + p * (kWide / kParts), &narrow, sizeof narrow);
    }
  }
  if (any_long(ties)) exact_small(call, h, cumulative, total, offset, s);
}

// Ancestors by counting: slot j takes the first particle whose cumulative count exceeds j, so its
// index is the number of those that do not. Comparisons give -1 where they hold.
template <int kMost, bool kExact>
inline void ancestors_small(const ResampleCall& call, SmallPopulations* s) {
  const int64_t k = kExact ? kMost : call.particles;
  const bool keep_slots = call.keep_slots;
  const bool independent =
      (call.scheme == Scheme::kMultinomial || call.scheme == Scheme::kKilling) && !keep_slots;
  const i32x16 resampled = load_integers(s->resampled);
  i32x16 offspring[kSmallParticles];
  i32x16 ends[kSmallParticles];  // of the particles that slots are counted against
  i32x16 previous = 0;
  i32x16 surplus = 0;
  for (int64_t i = 0; i < k; ++i) {
    const i32x16 end = load_integers(s->counts[i]);
    offspring[i] = end - previous;
    previous = end;
    // With keep_slots the freed slots are dealt the offspring beyond each survivor's first.
    surplus = surplus + ((offspring[i] > i32x16(0)) & (offspring[i] - 1));
    ends[i] = keep_slots ? surplus : end;
  }
  i32x16 freed = 0;
  for (int64_t j = 0; j < k; ++j) {
    const i32x16 slot = static_cast<int32_t>(j);
    const i32x16 rank = keep_slots ? freed : slot;
    i32x16 ancestor = 0;
    if (independent) {
      ancestor = load_integers(s->chosen[j]);
    } else {
      for (int64_t i = 0; i < k; ++i) ancestor = ancestor - ((ends[i] < rank) | (ends[i] == rank));
    }
    i32x16 stays = resampled ^ i32x16(-1);
    if (keep_slots) {
      const i32x16 alive = offspring[j] > i32x16(0);
      freed = freed + 1 + alive;
      stays = stays | alive;
    }
    ancestor = select(stays, slot, ancestor);
    const i32x16 packed = ancestor | (select(resampled, offspring[j], i32x16(1)) << 8);
    std::memcpy(s->packed[j], &packed, sizeof packed);
  }
}

template <int kMost, bool kExact>
inline void store_small(const ResampleCall& call, int64_t row, int64_t n, bool any_resampled,
                        SmallPopulations* s) {
  const int64_t k = kExact ? kMost : call.particles;
  int64_t* ancestors = call.ancestors + row * k;
  int64_t* offspring = call.offspring + row * k;
  auto* log_weights = static_cast<float*>(call.new_log_weights) + row * k;
  if (any_resampled) {
    for (int64_t l = 0; l < kLanes; ++l) {
      for (int64_t i = 0; i < k; ++i) s->packed_rows[l * k + i] = s->packed[i][l];
    }
    for (int64_t i = 0; i < n * k; ++i) ancestors[i] = s->packed_rows[i] & 255;
    for (int64_t i = 0; i < n * k; ++i) offspring[i] = s->packed_rows[i] >> 8;
  } else {
    for (int64_t l = 0; l < n; ++l) {
      for (int64_t i = 0; i < k; ++i) ancestors[l * k + i] = i;
    }
    for (int64_t i = 0; i < n * k; ++i) offspring[i] = 1;
  }
  if (n == kLanes) {
    for (int64_t i = 0; i < k; ++i) store_lanes(log_weights + i * kLanes, 0.0f);
  } else {
    std::memset(log_weights, 0, static_cast<size_t>(n * k) * sizeof(float));
  }
  const i32x16 resampled = load_integers(s->resampled);
  if (any(resampled ^ i32x16(-1))) {
    for (int64_t l = 0; l < n; ++l) {
      if (s->resampled[l] == 0) carry(s->rows + l * k, k, log_weights + l * k);
    }
  }
  const i32x16 infinite = load_lanes(s->top) == f32x16(std::numeric_limits<float>::infinity());
  const i32x16 status = (load_integers(s->dead) & i32x16(kStatusNoWeight)) |
                        (load_integers(s->nan) & i32x16(kStatusNan)) |
                        (infinite & i32x16(kStatusInfinite));
  unsigned char flags[kLanes];
  for (int l = 0; l < kLanes; ++l) flags[l] = s->resampled[l] != 0;
  const auto count = static_cast<size_t>(n);
  std::memcpy(call.resampled + row, flags, count);
  std::memcpy(call.status + row, &status, count * sizeof(int32_t));
  std::memcpy(static_cast<float*>(call.log_z) + row, s->log_z, count * sizeof(float));
  std::memcpy(static_cast<float*>(call.ess) + row, s->ess, count * sizeof(float));
}

// kExact: the number of particles is known to be kMost, and transposing them is unrolled.
template <int kMost, bool kExact, typename T>
void resample_small(const ResampleCall& call, int64_t begin, int64_t end) {
  SmallPopulations s;
  for (int64_t row = begin; row < end; row += kLanes) {
    const int64_t n = end - row < kLanes ? end - row : kLanes;
    load_small<kMost, kExact>(static_cast<const T*>(call.log_weights) + row * call.stride,
                              call.stride, call.particles, n, &s);
    weigh_small<kMost>(call.particles, &s);
    const bool any_resampled = decide_small<kMost>(call, &s);
    if (any_resampled) {
      for (int h = 0; h < 2; ++h) count_small<kMost>(call, row, h, &s);
      ancestors_small<kMost, kExact>(call, &s);
    }
    store_small<kMost, kExact>(call, row, n, any_resampled, &s);
  }
}

}  // namespace
}  // namespace winnow
