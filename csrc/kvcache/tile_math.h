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

// Two registers out of 2 * kWide elements, in the order that costs least: that of element_in.
template <typename T>
inline void load_two(const T* p, FloatPart* v) {
  v[0] = load_part(p);
  v[1] = load_part(p + kWide);
}

// A bf16 is the upper half of a float: one shift widens the even elements, one mask the odd ones.
inline void load_two(const c10::BFloat16* p, FloatPart* v) {
  BitsPart raw;
  std::memcpy(&raw, p, sizeof raw);
  v[0] = (FloatPart)(raw << 16);
  v[1] = (FloatPart)(raw & 0xffff0000u);
}

// The first n < 2 * kWide elements, the others 0.
template <typename T>
inline void load_two(const T* p, int64_t n, FloatPart* v) {
  alignas(64) unsigned char raw[2 * kWide * sizeof(T)] = {};
  std::memcpy(raw, p, static_cast<size_t>(n) * sizeof(T));
  load_two(reinterpret_cast<const T*>(raw), v);
}

// Which of 2 * kWide elements lies in lane i of the two registers.
template <typename T>
constexpr int element_in(int i) {
  if (std::is_same_v<T, c10::BFloat16>) return i < kWide ? 2 * i : 2 * (i - kWide) + 1;
  return i;
}

constexpr int kStep = 2 * kWide;  // elements of a row that are multiplied at once

// A query row as dot_rows wants it for keys of type K.
template <typename K, typename T, typename Row>
void load_query(const T* from, int64_t dim, Row* to) {
  if constexpr (std::is_same_v<Row, T>) {
    // Rows of no numbers may have no memory at all.
    if (dim > 0) std::memcpy(static_cast<void*>(to), from, static_cast<size_t>(dim) * sizeof *to);
  } else if constexpr (std::is_same_v<Row, float>) {
    for (int64_t d = 0; d < dim; d += kStep) {
      float natural[kStep];
      for (int64_t i = 0; i < kStep; i += kWide) {
        const int64_t left = larger(0, dim - d - i);
        store_part(natural + i,
                   left >= kWide ? load_part(from + d + i) : load_part(from + d + i, left));
      }
      for (int i = 0; i < kStep; ++i) to[d + i] = natural[element_in<K>(i)];
    }
  }
}

template <int NR, typename T>
inline void dot_step(const QueryElement<T>* q, int64_t q_stride, const T* const* k, int64_t d,
                     int64_t left, FloatPart* sums) {
  constexpr int NK = kWide / NR;
#if defined(__AVX512BF16__)
  if constexpr (kPairs<T>) {
    const __mmask32 mask = left >= kStep ? ~0u : (1u << left) - 1u;
    __m512i rows[NR];
#pragma GCC unroll 16
    for (int r = 0; r < NR; ++r) rows[r] = _mm512_loadu_si512(q + r * q_stride + d);
#pragma GCC unroll 16
    for (int n = 0; n < NK; ++n) {
      const __m512i key =
          left >= kStep ? _mm512_loadu_si512(k[n] + d) : _mm512_maskz_loadu_epi16(mask, k[n] + d);
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
    FloatPart keys[NK][2];
#pragma GCC unroll 16
    for (int n = 0; n < NK; ++n) {
      if (left >= kStep) {
        load_two(k[n] + d, keys[n]);
      } else {
        load_two(k[n] + d, left, keys[n]);
      }
    }
#pragma GCC unroll 16
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 16
      for (int r = 0; r < NR; ++r) {
        const FloatPart row = load_part(q + r * q_stride + d + half * kWide);
#pragma GCC unroll 16
        for (int n = 0; n < NK; ++n) {
          sums[r * NK + n] = fma_part(row, keys[n][half], sums[r * NK + n]);
        }
      }
    }
  }
}

// scores[r][j] = q_r . k_j for NR rows, as many keys at a time as fill a register with sums.
template <int NR, typename T>
void dot_rows(const QueryElement<T>* q, int64_t q_stride, const T* keys, int64_t key_stride,
              int64_t count, int64_t dim, float* scores, Ahead ahead, Ahead again = {}) {
  constexpr int NK = kWide / NR;
  for (int64_t j = 0; j < count; j += NK) {
    const T* k[NK];
    for (int n = 0; n < NK; ++n) {
      const int64_t row = smaller(j + n, count - 1);
      k[n] = keys + row * key_stride;
    }
    FloatPart sums[kWide];
#pragma GCC unroll 16
    for (int i = 0; i < kWide; ++i) sums[i] = FloatPart{};
    int64_t d = 0;
    for (; d + kStep <= dim; d += kStep) {
      ahead.fetch(NK * kStep * static_cast<int64_t>(sizeof(T)));
      again.fetch(NK * kStep * static_cast<int64_t>(sizeof(T)));
      dot_step<NR>(q, q_stride, k, d, kStep, sums);
    }
    if (d < dim) dot_step<NR>(q, q_stride, k, d, dim - d, sums);
    float products[kWide];
    store_part(products, sum_each(sums));
    for (int r = 0; r < NR; ++r) {
      std::memcpy(scores + r * kKeys + j, products + r * NK, NK * sizeof(float));
    }
  }
}

// What the weights of a row are made with.
struct Weighing {
  float scale;        // of its scores
  const float* bias;  // of the tile's keys, or null
  float times;        // of its weights, behind their sum
};

// Turns the scores of one row into weights exp(score - top), kHidden where the row may not look.
// Returns their sum; *top becomes the largest score so far.
inline __attribute__((always_inline)) float weigh_row(float* scores, int64_t position, int64_t keys,
                                                      const Span& span, const Weighing& how,
                                                      float* top) {
  const bool whole = span.covers(position, keys);
  const auto local = [&](int64_t bound) {
    return static_cast<int32_t>(larger(-1, smaller(bound - position, kKeys)));
  };
  const i32x16 low = local(span.low);
  const i32x16 high = local(span.high);
  const i32x16 sinks = local(span.sinks);
  f32x16 running = *top;
  for (int64_t j = 0; j < keys; j += kLanes) {
    f32x16 x = load_lanes(scores + j) * how.scale;
    if (how.bias) {
      const f32x16 extra = load_lanes(how.bias + j);
      x = select(extra == f32x16(kNone), f32x16(kNone), x + extra);  // hides even a NaN
    }
    if (!whole || j + kLanes > keys) {
      const i32x16 index = lane_index() + static_cast<int32_t>(j);
      const i32x16 seen = ((index > low - 1) & (index < high)) | (index < sinks);
      x = select(seen & (index < static_cast<int32_t>(keys)), x, f32x16(kNone));
    }
    store_lanes(scores + j, x);
    running = max_lanes(x, running);
  }
  const float highest = halving_max(running);
  const float shift = highest == kNone ? 0.0f : highest;  // -inf - -inf would be NaN
  f32x16 sum = 0.0f;
  for (int64_t j = 0; j < keys; j += kLanes) {
    const f32x16 x = load_lanes(scores + j);
    const f32x16 weight =
        select(x == f32x16(kNone), as_float(i32x16(kHidden)), exp_below(x - shift));
    store_lanes(scores + j, weight * how.times);  // -0 stays -0
    sum = sum + weight;
  }
  *top = highest;
  return halving_sum(sum);
}

// The same for NR rows, and what becomes of their earlier sums: *total joins the new one, *shrink
// is what the larger top scales them by.
template <int NR>
void weigh_rows(const PagedAttention& call, int64_t length, int64_t first_row, const Tile& tile,
                const Weighing& how, float* scores, float* top, float* total, float* shrink) {
  float sums[NR];
  float factor[kLanes] = {};
  for (int r = 0; r < NR; ++r) {
    const float before = top[r];
    float* row = scores + r * kKeys;
    const Span span = span_of(call, length, first_row + r);
    // A whole tile without loops.
    sums[r] = tile.keys == kKeys ? weigh_row(row, tile.position, kKeys, span, how, top + r)
                                 : weigh_row(row, tile.position, tile.keys, span, how, top + r);
    factor[r] = top[r] == before ? 0.0f : before - top[r];
  }
  store_lanes(factor, exp_below(load_lanes(factor)));
  for (int r = 0; r < NR; ++r) {
    shrink[r] = factor[r];
    total[r] = total[r] * shrink[r] + sums[r];
  }
}

// strip[r][c] += sum_j weights[r][j] * values[j][c]. `left` < kStep for the last, incomplete
// columns (with NC = 2).
template <int NR, int NC, typename T>
inline void sum_values(const float* weights, const T* values, int64_t stride, int64_t count,
                       int64_t left, FloatPart (&strip)[NR][NC], Ahead* ahead) {
  constexpr int64_t kBytes = NC * kWide * static_cast<int64_t>(sizeof(T));
  for (int64_t j = 0; j < count; ++j) {
    if (kBytes >= 64 || j % 2 == 0) ahead->fetch(kBytes >= 64 ? kBytes : 64);
    const T* row = values + j * stride;
    FloatPart v[NC];
#pragma GCC unroll 16
    for (int c = 0; c < NC; c += 2) {
      if (NC > 2 || left >= kStep) {
        load_two(row + c * kWide, v + c);
      } else {
        load_two(row, left, v);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < NR; ++r) {
      const FloatPart weight = broadcast_part(weights[r * kKeys + j]);
#pragma GCC unroll 16
      for (int c = 0; c < NC; ++c) strip[r][c] = fma_part(weight, v[c], strip[r][c]);
    }
  }
}

inline bool is_hidden(const float* weight) {
  int32_t bits;
  std::memcpy(&bits, weight, sizeof bits);
  return bits == kHidden;
}

// The sums of one row and two registers of columns, leaving out what is hidden.
template <typename T>
__attribute__((cold, noinline)) void sum_seen_values(const float* weights, const T* values,
                                                     int64_t stride, int64_t count, int64_t left,
                                                     FloatPart* sums) {
  sums[0] = sums[1] = FloatPart{};
  for (int64_t j = 0; j < count; ++j) {
    if (is_hidden(weights + j)) continue;
    FloatPart v[2];
    if (left >= kStep) {
      load_two(values + j * stride, v);
    } else {
      load_two(values + j * stride, left, v);
    }
    for (int c = 0; c < 2; ++c) sums[c] = fma_part(broadcast_part(weights[j]), v[c], sums[c]);
  }
}

// sums[r][c] = sums[r][c] * shrink[r] + sum_j weights[r][j] * values[j][c] for NR rows and NC
// registers of columns.
template <int NR, int NC, typename T>
void add_strip(const float* weights, const T* values, int64_t stride, int64_t count, int64_t left,
               float* sums, int64_t sums_stride, const float* shrink, Ahead* ahead) {
  FloatPart strip[NR][NC] = {};
  sum_values<NR, NC>(weights, values, stride, count, left, strip, ahead);
  FloatPart all{};
#pragma GCC unroll 16
  for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < NC; ++c) all += strip[r][c];
  }
  if (__builtin_expect(any_nan(all), 0)) {
    // A NaN or an infinity that is hidden has spoilt the sums. The second ones are kept in memory,
    // so that the first ones need not be.
    for (int r = 0; r < NR; ++r) {
      float* sum = sums + r * sums_stride;
      for (int c = 0; c < NC; c += 2) {
        FloatPart seen[2];
        sum_seen_values(weights + r * kKeys, values + c * kWide, stride, count, left, seen);
        for (int i = 0; i < 2; ++i) {
          float* at = sum + (c + i) * kWide;
          store_part(at, fma_part(load_part(at), broadcast_part(shrink[r]), seen[i]));
        }
      }
    }
    return;
  }
#pragma GCC unroll 16
  for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < NC; ++c) {
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
    add_strip<NR, NC>(weights, values + c, stride, count, kStep, sums + c, sums_stride, shrink,
                      &ahead);
  }
  for (; c < dim; c += kStep) {
    add_strip<NR, 2>(weights, values + c, stride, count, dim - c, sums + c, sums_stride, shrink,
                     &ahead);
  }
}

}  // namespace
}  // namespace winnow::CPU_CAPABILITY
