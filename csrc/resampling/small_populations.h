// Systematic resampling of populations of at most 16 particles, sixteen populations at a time: lane
// l of every vector belongs to population l. The same operations in the same order as for a large
// population, so a population's result does not depend on the path; what a population of four costs
// otherwise is mostly the steps between.
#pragma once

#include <cstdint>
#include <limits>

#include "resampling/spread.h"
#include "resampling/weigh.h"

namespace winnow {
namespace {

constexpr int64_t kSmallParticles = 16;

inline bool is_small(const ResampleCall& call) {
  return call.particles > 0 && call.particles <= kSmallParticles &&
         call.samples == call.particles && call.scheme == Scheme::kSystematic &&
         call.mask == nullptr && call.uniforms == nullptr;
}

// kWide populations: sums in the order of sum_wide(block_sums), fixed-point weights cumulated.
template <int kMost>
inline f64x8 lanes_sum(const f64x8* w) {
  // Beyond kMost every term is zero, and adding it changes nothing.
  const auto pair = [&](int i) { return kMost > 8 ? w[i] + w[i + 8] : w[i]; };
  if (kMost == 4) return (w[0] + w[2]) + (w[1] + w[3]);
  return ((pair(0) + pair(4)) + (pair(2) + pair(6))) + ((pair(1) + pair(5)) + (pair(3) + pair(7)));
}

struct SmallPopulations {
  // [particle][population]
  alignas(64) float x[kSmallParticles][kLanes];
  alignas(64) float w[kSmallParticles][kLanes];
  alignas(64) int32_t counts[kSmallParticles][kLanes];
  alignas(64) int32_t packed[kSmallParticles][kLanes];  // ancestor + 256 offspring
  // [population]
  alignas(64) float top[kLanes];
  alignas(64) int32_t dead[kLanes];
  alignas(64) int32_t nan[kLanes];
  alignas(64) int32_t resampled[kLanes];
  alignas(64) double ess[kLanes];
  alignas(64) double log_z[kLanes];
  // [population][particle]
  alignas(64) float rows[kLanes * kSmallParticles + kLanes];
  alignas(64) int32_t packed_rows[kLanes * kSmallParticles];
};

// Reads n populations; the lanes beyond hold zeros.
template <typename T>
inline void load_small(const T* from, int64_t stride, int64_t k, int64_t n, SmallPopulations* s) {
  const int64_t size = n * k;
  if (stride == k) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) store_lanes(s->rows + i, load_lanes(from + i));
    if (i < size) store_lanes(s->rows + i, load_lanes(from + i, size - i, 0.0f));
  } else {
    for (int64_t l = 0; l < n; ++l) {
      store_lanes(s->rows + l * k, load_lanes(from + l * stride, k, 0.0f));
    }
  }
  for (int64_t l = 0; l < kLanes; ++l) {
    for (int64_t i = 0; i < k; ++i) s->x[i][l] = l < n ? s->rows[l * k + i] : 0.0f;
  }
}

template <int kMost>
inline void weigh_small(int64_t k, SmallPopulations* s) {
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

// ESS, the decision, and cumulative counts of populations [8 h, 8 h + 8).
template <int kMost>
inline bool count_small(const ResampleCall& call, int64_t row, int h, SmallPopulations* s) {
  const int64_t k = call.particles;
  const double particles = static_cast<double>(k);
  f64x8 w[kMost];
  f64x8 squares[kMost];
  for (int i = 0; i < kMost; ++i) {
    w[i] = load_wide(s->w[i] + h * kWide);
    squares[i] = w[i] * w[i];
  }
  const f64x8 sum = lanes_sum<kMost>(w);
  const f64x8 square_sum = lanes_sum<kMost>(squares);
  const double log_particles = log_of(particles);
  f64x8 ess;
  f64x8 scale;
  for (int p = 0; p < kParts; ++p) {
    ess.part[p] = sum.part[p] * sum.part[p] / square_sum.part[p];
    const LongPart exponent = ((LongPart)sum.part[p] >> 52) - 1023;
    scale.part[p] = (DoublePart)((59 - exponent + 1023) << 52);
  }
  const f64x8 log_z = log_wide(sum) - wide(log_particles) + load_wide(s->top + h * kWide);
  std::memcpy(s->ess + h * kWide, &ess, sizeof ess);
  std::memcpy(s->log_z + h * kWide, &log_z, sizeof log_z);
  bool some = false;
  for (int l = h * kWide; l < (h + 1) * kWide; ++l) {
    const bool triggered =
        !s->dead[l] && (call.ess_threshold < 0 || s->ess[l] < call.ess_threshold * particles);
    s->resampled[l] = triggered ? -1 : 0;
    some |= triggered;
  }
  if (!some) return false;

  u64x8 cumulative[kMost];
  u64x8 total = wide_word(0);
  for (int i = 0; i < kMost; ++i) {
    if (i >= k) break;
    const u64x8 q = to_words(w[i] * scale);
    for (int p = 0; p < kParts; ++p) total.part[p] += q.part[p];
    cumulative[i] = total;
  }
  u64x8 rows;
  for (int p = 0; p < kParts; ++p) {
    LongPart lane;
    int64_t index[kWide / kParts];
    for (int l = 0; l < kWide / kParts; ++l) index[l] = row + h * kWide + p * (kWide / kParts) + l;
    std::memcpy(&lane, index, sizeof lane);
    rows.part[p] = (WordPart)lane;
  }
  const u64x8 drawn = philox_wide(call.seed, rows, wide_word(0));
  uint64_t totals[kWide];
  uint64_t bits[kWide];
  uint64_t offsets[kWide];
  std::memcpy(totals, &total, sizeof total);
  std::memcpy(bits, &drawn, sizeof drawn);
  for (int l = 0; l < kWide; ++l) offsets[l] = multiply_high(bits[l], totals[l]);
  const f64x8 denominator = to_double(total);
  const f64x8 offset = to_double(load_wide(offsets));
  const double near = near_tie(k);
  for (int i = 0; i < kMost; ++i) {
    if (i >= k) break;
    const f64x8 c = to_double(cumulative[i]);
    int64_t counts[kWide];
    LongPart ties = {};
    for (int p = 0; p < kParts; ++p) {
      const DoublePart ratio = particles / denominator.part[p];
      const DoublePart shift = offset.part[p] / denominator.part[p];
      const LongPart count = count_part(c.part[p] * ratio - shift, near, &ties);
      std::memcpy(counts + p * (kWide / kParts), &count, sizeof count);
    }
    if (any_long(ties)) {
      uint64_t exact[kWide];
      std::memcpy(exact, &cumulative[i], sizeof exact);
      for (int l = 0; l < kWide; ++l) {
        counts[l] = systematic_exact(make_grid(k, totals[l], offsets[l]), exact[l], counts[l]);
      }
    }
    for (int l = 0; l < kWide; ++l) s->counts[i][h * kWide + l] = static_cast<int32_t>(counts[l]);
  }
  return true;
}

inline i32x16 load_integers(const int32_t* from) {
  i32x16 v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// Ancestors by counting: slot j takes the first particle whose cumulative count exceeds j, so its
// index is the number of those that do not. Comparisons give -1 where they hold.
inline void ancestors_small(int64_t k, bool keep_slots, SmallPopulations* s) {
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
    for (int64_t i = 0; i < k; ++i) ancestor = ancestor - ((ends[i] < rank) | (ends[i] == rank));
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

inline void store_small(const ResampleCall& call, int64_t row, int64_t n, bool any_resampled,
                        SmallPopulations* s) {
  const int64_t k = call.particles;
  int64_t* ancestors = call.ancestors + row * k;
  int64_t* offspring = call.offspring + row * k;
  auto* log_weights = static_cast<float*>(call.new_log_weights) + row * k;
  if (any_resampled) {
    for (int64_t l = 0; l < n; ++l) {
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
  std::memset(log_weights, 0, static_cast<size_t>(n * k) * sizeof(float));
  for (int64_t l = 0; l < n; ++l) {
    const bool resampled = s->resampled[l] != 0;
    if (!resampled) carry(s->rows + l * k, k, log_weights + l * k);
    static_cast<float*>(call.log_z)[row + l] = resampled ? static_cast<float>(s->log_z[l]) : 0.0f;
    static_cast<float*>(call.ess)[row + l] = s->dead[l] ? 0.0f : static_cast<float>(s->ess[l]);
    call.resampled[row + l] = resampled;
    const bool infinite = s->top[l] == std::numeric_limits<float>::infinity();
    call.status[row + l] = (s->dead[l] ? kStatusNoWeight : 0) | (s->nan[l] ? kStatusNan : 0) |
                           (infinite ? kStatusInfinite : 0);
  }
}

template <int kMost, typename T>
void resample_small(const ResampleCall& call, int64_t begin, int64_t end) {
  SmallPopulations s;
  for (int64_t row = begin; row < end; row += kLanes) {
    const int64_t n = end - row < kLanes ? end - row : kLanes;
    load_small(static_cast<const T*>(call.log_weights) + row * call.stride, call.stride,
               call.particles, n, &s);
    weigh_small<kMost>(call.particles, &s);
    bool any_resampled = false;
    for (int h = 0; h < 2; ++h) any_resampled |= count_small<kMost>(call, row, h, &s);
    if (any_resampled) ancestors_small(call.particles, call.keep_slots, &s);
    store_small(call, row, n, any_resampled, &s);
  }
}

}  // namespace
}  // namespace winnow
