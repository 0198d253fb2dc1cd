// The arithmetic of a tile of keys: scores of a few rows at a time, their weights, and the weighted
// values. Included by *_simd.cc only.
#pragma once

#include <limits>
#include <type_traits>

#include "common/lanes.h"
#include "kvcache/page_walk.h"
#include "kvcache/tile_lanes.h"

namespace winnow::CPU_CAPABILITY {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();
// The weight of a key that its row may not see: adds nothing, and differs from a weight that
// underflowed. What an excluded key or value holds, even NaN, must not reach the result.
constexpr int32_t kHidden = std::numeric_limits<int32_t>::min();  // the bits of -0.0

// Query rows as the dot products want them: floats, or bf16 pairs where the machine multiplies
// those.
#if defined(__AVX512BF16__)
template <typename T>
constexpr bool kPairs = std::is_same_v<T, c10::BFloat16>;
#else
template <typename T>
constexpr bool kPairs = false;
#endif
template <typename T>
using QueryElement = std::conditional_t<kPairs<T>, T, float>;

// One step of the dot products: kStep<T> elements of each row and key.
template <typename T>
constexpr int kStep = kPairs<T> ? 2 * kLanes : kWide;

template <int NR, typename T>
inline void dot_step(const QueryElement<T>* q, int64_t q_stride, const T* const* k, int64_t d,
                     int64_t left, FloatPart* sums) {
  constexpr int NK = kWide / NR;
#if defined(__AVX512BF16__)
  if constexpr (kPairs<T>) {
    const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1u;
    __m512i rows[NR];
#pragma GCC unroll 16
    for (int r = 0; r < NR; ++r) rows[r] = _mm512_loadu_si512(q + r * q_stride + d);
#pragma GCC unroll 16
    for (int n = 0; n < NK; ++n) {
      const __m512i key =
          left >= 32 ? _mm512_loadu_si512(k[n] + d) : _mm512_maskz_loadu_epi16(mask, k[n] + d);
#pragma GCC unroll 16
      for (int r = 0; r < NR; ++r) {
        sums[r * NK + n] =
            (FloatPart)_mm512_dpbf16_ps((__m512)sums[r * NK + n], (__m512bh)rows[r], (__m512bh)key);
      }
    }
    return;
  }
#endif
  if constexpr (!kPairs<T>) {
    FloatPart rows[NR];
#pragma GCC unroll 16
    for (int r = 0; r < NR; ++r) rows[r] = load_part(q + r * q_stride + d);
#pragma GCC unroll 16
    for (int n = 0; n < NK; ++n) {
      const FloatPart key = left >= kWide ? load_part(k[n] + d) : load_part(k[n] + d, left);
#pragma GCC unroll 16
      for (int r = 0; r < NR; ++r) sums[r * NK + n] = fma_part(rows[r], key, sums[r * NK + n]);
    }
  }
}

// scores[r][j] = q_r . k_j for NR rows, as many keys at a time as fill a register with sums.
template <int NR, typename T>
void dot_rows(const QueryElement<T>* q, int64_t q_stride, const T* keys, int64_t key_stride,
              int64_t count, int64_t dim, float* scores, Ahead ahead) {
  constexpr int NK = kWide / NR;
  for (int64_t j = 0; j < count; j += NK) {
    const T* k[NK];
    for (int n = 0; n < NK; ++n) {
      const int64_t row = smaller(j + n, count - 1);
      k[n] = keys + row * key_stride;
      ahead.fetch(ahead.bytes);
    }
    FloatPart sums[kWide];
#pragma GCC unroll 16
    for (int i = 0; i < kWide; ++i) sums[i] = FloatPart{};
    int64_t d = 0;
    for (; d + kStep<T> <= dim; d += kStep<T>) dot_step<NR>(q, q_stride, k, d, kStep<T>, sums);
    if (d < dim) dot_step<NR>(q, q_stride, k, d, dim - d, sums);
    float products[kWide];
    store_part(products, sum_each(sums));
    for (int r = 0; r < NR; ++r) {
      std::memcpy(scores + r * kKeys + j, products + r * NK, NK * sizeof(float));
    }
  }
}

// Turns the scores of one row into weights exp(score - top), kHidden where the row may not look.
void weigh(float* scores, const Tile& tile, const Span& span, float scale, const float* bias,
           float* top, float* total, float* shrink) {
  const bool whole = span.covers(tile.position, tile.keys);
  const auto local = [&](int64_t bound) {
    return static_cast<int32_t>(larger(-1, smaller(bound - tile.position, kKeys)));
  };
  const i32x16 low = local(span.low);
  const i32x16 high = local(span.high);
  const i32x16 sinks = local(span.sinks);
  f32x16 running = *top;
  for (int64_t j = 0; j < tile.keys; j += kLanes) {
    f32x16 x = load_lanes(scores + j) * scale;
    if (bias) {
      const f32x16 extra = load_lanes(bias + j);
      x = select(extra == f32x16(kNone), f32x16(kNone), x + extra);  // hides even a NaN
    }
    if (!whole || j + kLanes > tile.keys) {
      const i32x16 index = lane_index() + static_cast<int32_t>(j);
      const i32x16 seen = ((index > low - 1) & (index < high)) | (index < sinks);
      x = select(seen & (index < static_cast<int32_t>(tile.keys)), x, f32x16(kNone));
    }
    store_lanes(scores + j, x);
    running = max_lanes(x, running);
  }
  const float highest = halving_max(running);
  const float shift = highest == kNone ? 0.0f : highest;  // -inf - -inf would be NaN
  f32x16 sum = 0.0f;
  for (int64_t j = 0; j < tile.keys; j += kLanes) {
    const f32x16 x = load_lanes(scores + j);
    const f32x16 weight =
        select(x == f32x16(kNone), as_float(i32x16(kHidden)), exp_lanes(x - shift));
    store_lanes(scores + j, weight);
    sum = sum + weight;
  }
  float factor[kLanes];
  store_lanes(factor, exp_lanes(f32x16(*top - shift)));
  *shrink = *top == highest ? 1.0f : factor[0];
  *total = *total * *shrink + halving_sum(sum);
  *top = highest;
}

// The sums of a strip once more, key by key, leaving out what is hidden: a NaN or an infinity there
// has spoilt them.
template <typename Load>
FloatPart careful_sum(const float* weights, int64_t count, const Load& load) {
  FloatPart sum{};
  for (int64_t j = 0; j < count; ++j) {
    int32_t bits;
    std::memcpy(&bits, weights + j, sizeof bits);
    if (bits != kHidden) sum = fma_part(broadcast_part(weights[j]), load(j), sum);
  }
  return sum;
}

// sums[r][c] = sums[r][c] * shrink[r] + sum_j weights[r][j] * values[j][c] for NR rows and NC
// registers of columns; `columns` < kWide (with NC = 1) for the last, incomplete one.
template <int NR, int NC, typename T>
void add_strip(const float* weights, const T* values, int64_t stride, int64_t count,
               int64_t columns, float* sums, int64_t sums_stride, const float* shrink,
               Ahead* ahead) {
  const auto load = [&](int64_t j, int c) {
    const T* row = values + j * stride;
    return NC > 1 || columns >= kWide ? load_part(row + c * kWide) : load_part(row, columns);
  };
  FloatPart strip[NR][NC];
#pragma GCC unroll 16
  for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < NC; ++c) strip[r][c] = FloatPart{};
  }
  for (int64_t j = 0; j < count; ++j) {
    ahead->fetch(NC * kWide * static_cast<int64_t>(sizeof(T)));
    FloatPart v[NC];
#pragma GCC unroll 16
    for (int c = 0; c < NC; ++c) v[c] = load(j, c);
#pragma GCC unroll 16
    for (int r = 0; r < NR; ++r) {
      const FloatPart weight = broadcast_part(weights[r * kKeys + j]);
#pragma GCC unroll 16
      for (int c = 0; c < NC; ++c) strip[r][c] = fma_part(weight, v[c], strip[r][c]);
    }
  }
  FloatPart all{};
#pragma GCC unroll 16
  for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < NC; ++c) all += strip[r][c];
  }
  const bool spoilt = any_nan(all);
#pragma GCC unroll 16
  for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < NC; ++c) {
      if (__builtin_expect(spoilt, 0)) {
        strip[r][c] =
            careful_sum(weights + r * kKeys, count, [&](int64_t j) { return load(j, c); });
      }
      float* sum = sums + r * sums_stride + c * kWide;
      store_part(sum, fma_part(load_part(sum), broadcast_part(shrink[r]), strip[r][c]));
    }
  }
}

// Registers of columns that a strip of NR rows keeps: all accumulators, values and a weight fit.
template <int NR>
constexpr int kStripColumns = (kParts == 1 ? 16 : 8) / NR;

template <int NR, typename T>
void add_values(const float* weights, const T* values, int64_t stride, int64_t count, int64_t dim,
                float* sums, int64_t sums_stride, const float* shrink, Ahead ahead) {
  constexpr int NC = kStripColumns<NR> > 8 ? 8 : kStripColumns<NR>;
  int64_t c = 0;
  for (; c + NC * kWide <= dim; c += NC * kWide) {
    add_strip<NR, NC>(weights, values + c, stride, count, 0, sums + c, sums_stride, shrink, &ahead);
  }
  for (; c < dim; c += kWide) {
    add_strip<NR, 1>(weights, values + c, stride, count, dim - c, sums + c, sums_stride, shrink,
                     &ahead);
  }
}

}  // namespace
}  // namespace winnow::CPU_CAPABILITY
