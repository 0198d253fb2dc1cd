// Quantised pages in a tile. Where the machine has dot products of 16-bit pairs, and the queries
// are no float32, codes become such numbers in registers, 64 at a time (code_pairs.h). Elsewhere
// they become floats (code_lanes.h) and go through the loops of tile_math.h. Scales go into the
// scores and the weights. Included by *_simd.cc only.
#pragma once

#include <type_traits>

#include "common/lanes.h"
#include "kvcache/code_lanes.h"
#include "kvcache/code_pairs.h"
#include "kvcache/codes.h"
#include "kvcache/page_walk.h"
#include "kvcache/tile_lanes.h"
#include "kvcache/tile_math.h"

namespace winnow::CPU_CAPABILITY {
namespace {

// What the loops over quantised pages are instantiated for: the queries in scratch memory are
// floats or, in pairs, 16-bit numbers, whatever they came as.
template <typename Code, bool kInPairs>
struct Coded {};

template <typename T>
struct ElementsOf {
  using Page = T;
  using Row = QueryElement<T>;
  static constexpr bool kCodes = false;
  static constexpr bool kCodePairs = false;
};
template <typename Code, bool kInPairs>
struct ElementsOf<Coded<Code, kInPairs>> {
  using Page = Code;
  using Pair = std::conditional_t<std::is_same_v<Code, int8_t>, int16_t, c10::BFloat16>;
  using Row = std::conditional_t<kInPairs, Pair, float>;
  static constexpr bool kCodes = true;
  static constexpr bool kCodePairs = kInPairs;
};
template <typename T>
using PageElement = typename ElementsOf<T>::Page;
template <typename T>
using RowElement = typename ElementsOf<T>::Row;

inline float scale_of(const float* scales, const int64_t* stride, const Tile& tile, int64_t head) {
  return scales[tile.block * stride[0] + head * stride[1]];
}

#if defined(__AVX512BF16__)
// One step of the dot products, inlined with a constant `left` where it is whole: a branch per load
// would make the compiler keep the sums in memory.
template <int NR, typename Code>
inline __attribute__((always_inline)) void dot_code_step(const Pairs<Code>& pairs,
                                                         const typename Pairs<Code>::Element* q,
                                                         int64_t q_stride, const Code* const* k,
                                                         int64_t d, int64_t left, __m512i* sums) {
  constexpr int NK = kWide / NR;
#pragma GCC unroll 16
  for (int n = 0; n < NK; ++n) {
    __m512i first;
    __m512i second;
    pairs.widen(load_codes_512(k[n] + d, left), &first, &second);
#pragma GCC unroll 16
    for (int r = 0; r < NR; ++r) {
      const auto* row = q + r * q_stride;
      __m512i sum = sums[r * NK + n];
      sum = pairs.multiply_add(sum, _mm512_loadu_si512(row), first);
      sum = pairs.multiply_add(sum, _mm512_loadu_si512(row + 32), second);
      sums[r * NK + n] = sum;
    }
  }
}

// dot_rows of tile_math.h for codes.
template <int NR, typename Code>
__attribute__((noinline)) void dot_code_rows(const typename Pairs<Code>::Element* q,
                                             int64_t q_stride, const WordRow* words,
                                             const Code* keys, int64_t key_stride, int64_t count,
                                             int64_t dim, float* scores, Ahead ahead, Ahead again) {
  constexpr int NK = kWide / NR;
  constexpr bool kWords = std::is_same_v<Code, int8_t>;
  using Sum = typename Pairs<Code>::Sum;
  const Pairs<Code> pairs;
  float units[kWide];  // of every product
  Sum excess{};
  for (int i = 0; kWords && i < kWide; ++i) {
    units[i] = words[i / NK].unit;
    excess[i] = words[i / NK].excess;
  }
  for (int64_t j = 0; j < count; j += NK) {
    const Code* k[NK];
    for (int n = 0; n < NK; ++n) {
      k[n] = keys + smaller(j + n, count - 1) * key_stride;
    }
    __m512i sums[kWide];
#pragma GCC unroll 16
    for (int i = 0; i < kWide; ++i) sums[i] = _mm512_setzero_si512();
    int64_t d = 0;
    for (; d + kCodes <= dim; d += kCodes) {
      ahead.fetch(NK * kCodes);
      again.fetch(NK * kCodes);
      dot_code_step<NR>(pairs, q + d, q_stride, k, d, kCodes, sums);
    }
    if (d < dim) {
      ahead.fetch(NK * (dim - d));
      again.fetch(NK * (dim - d));
      dot_code_step<NR>(pairs, q + d, q_stride, k, d, dim - d, sums);
    }
    Sum parts[kWide];
#pragma GCC unroll 16
    for (int i = 0; i < kWide; ++i) parts[i] = (Sum)sums[i];
    FloatPart dots = pairs.to_floats(sum_each(parts) - excess);
    if constexpr (kWords) dots *= load_part(units);
    float products[kWide];
    store_part(products, dots);
    for (int r = 0; r < NR; ++r) {
      std::memcpy(scores + r * kKeys + j, products + r * NK, NK * sizeof(float));
    }
  }
}

// The sums of one row and a register of columns, leaving out what is hidden.
template <typename Load>
__attribute__((cold, noinline)) FloatPart sum_seen_codes(const float* weights, int64_t count,
                                                         const Load& load) {
  FloatPart sum{};
  for (int64_t j = 0; j < count; ++j) {
    if (!is_hidden(weights + j)) sum = fma_part(broadcast_part(weights[j]), load(j), sum);
  }
  return sum;
}

// Adds keys j and j + 1 (without a pair, j alone); `left` is a constant where the columns are
// whole.
template <int NR, typename Code>
inline __attribute__((always_inline)) void add_code_step(const Pairs<Code>& pairs,
                                                         const uint32_t (&words)[NR][kKeys / 2],
                                                         const Code* column, int64_t stride,
                                                         int64_t j, int64_t left, bool pair,
                                                         __m512i (&strip)[NR][4]) {
  const Code* row = column + j * stride;
  const __m512i even = load_codes_512(row, left);
  const __m512i odd = pair ? load_codes_512(row + stride, left) : _mm512_setzero_si512();
  __m512i v[4];  // columns 4 c to 4 c + 3 of every 16
  pairs.widen(_mm512_unpacklo_epi8(even, odd), &v[0], &v[1]);
  pairs.widen(_mm512_unpackhi_epi8(even, odd), &v[2], &v[3]);
#pragma GCC unroll 16
  for (int r = 0; r < NR; ++r) {
    const __m512i weight = _mm512_set1_epi32(static_cast<int>(words[r][j / 2]));
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) strip[r][c] = pairs.multiply_add(strip[r][c], weight, v[c]);
  }
}

// add_values of tile_math.h for codes: two keys at a time, whose codes of one column are a pair.
template <int NR, typename Code>
__attribute__((noinline)) void add_code_values(const float* weights, const Code* values,
                                               int64_t stride, int64_t count, int64_t dim,
                                               float* sums, int64_t sums_stride,
                                               const float* shrink, Ahead ahead) {
  using Sum = typename Pairs<Code>::Sum;
  const Pairs<Code> pairs;
  alignas(64) uint32_t words[NR][kKeys / 2];
  float unit[NR];
  float excess[NR];
  for (int r = 0; r < NR; ++r) {
    unit[r] = weigh_pairs(pairs, weights + r * kKeys, count, words[r], excess + r);
  }
  for (int64_t d = 0; d < dim; d += kCodes) {
    const int64_t left = dim - d;
    __m512i strip[NR][4];
#pragma GCC unroll 16
    for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) strip[r][c] = _mm512_setzero_si512();
    }
    const Code* column = values + d;
    int64_t j = 0;
    if (left >= kCodes) {
      for (; j + 2 <= count; j += 2) {
        ahead.fetch(kCodes);
        ahead.fetch(kCodes);
        add_code_step<NR>(pairs, words, column, stride, j, kCodes, true, strip);
      }
    } else {
      for (; j + 2 <= count; j += 2) {
        ahead.fetch(left);
        ahead.fetch(left);
        add_code_step<NR>(pairs, words, column, stride, j, left, true, strip);
      }
    }
    if (j < count) {
      ahead.fetch(smaller(left, kCodes));
      add_code_step<NR>(pairs, words, column, stride, j, left, false, strip);
    }
    // By constant indices only, or the compiler would keep all strips in memory.
    __m512 quarters[NR][4];
#pragma GCC unroll 16
    for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) quarters[r][c] = (__m512)pairs.to_floats((Sum)strip[r][c]);
    }
    for (int r = 0; r < NR; ++r) {
      // Transposed.
      const __m512 a = _mm512_shuffle_f32x4(quarters[r][0], quarters[r][1], 0x44);
      const __m512 b = _mm512_shuffle_f32x4(quarters[r][0], quarters[r][1], 0xee);
      const __m512 c = _mm512_shuffle_f32x4(quarters[r][2], quarters[r][3], 0x44);
      const __m512 e = _mm512_shuffle_f32x4(quarters[r][2], quarters[r][3], 0xee);
      const __m512 columns[4] = {_mm512_shuffle_f32x4(a, c, 0x88), _mm512_shuffle_f32x4(a, c, 0xdd),
                                 _mm512_shuffle_f32x4(b, e, 0x88),
                                 _mm512_shuffle_f32x4(b, e, 0xdd)};
      for (int64_t i = 0; i < 4 && i * kLanes < left; ++i) {
        auto part = (FloatPart)columns[i];
        if constexpr (std::is_same_v<Code, int8_t>) {
          part = (part - broadcast_part(excess[r])) * broadcast_part(unit[r]);
        } else if (__builtin_expect(any_nan(part), 0)) {
          const int64_t n = smaller(kLanes, left - i * kLanes);
          part = sum_seen_codes(weights + r * kKeys, count, [&](int64_t j) {
            return load_part(values + j * stride + d + i * kLanes, n);
          });
        }
        float* sum = sums + r * sums_stride + d + i * kLanes;
        store_part(sum, fma_part(load_part(sum), broadcast_part(shrink[r]), part));
      }
    }
  }
}
#endif

// dot_rows and add_values for whatever T stands for.
template <int NR, typename T>
inline void dot_keys(const RowElement<T>* q, int64_t q_stride,
                     [[maybe_unused]] const WordRow* words, const PageElement<T>* keys,
                     int64_t key_stride, int64_t count, int64_t dim, float* scores, Ahead ahead,
                     Ahead again) {
#if defined(__AVX512BF16__)
  if constexpr (ElementsOf<T>::kCodePairs) {
    return dot_code_rows<NR>(q, q_stride, words, keys, key_stride, count, dim, scores, ahead,
                             again);
  } else
#endif
    dot_rows<NR, PageElement<T>>(q, q_stride, keys, key_stride, count, dim, scores, ahead, again);
}

template <int NR, typename T>
inline void add_weighted(const float* weights, const PageElement<T>* values, int64_t stride,
                         int64_t count, int64_t dim, float* sums, int64_t sums_stride,
                         const float* shrink, Ahead ahead) {
#if defined(__AVX512BF16__)
  if constexpr (ElementsOf<T>::kCodePairs) {
    return add_code_values<NR>(weights, values, stride, count, dim, sums, sums_stride, shrink,
                               ahead);
  } else
#endif
    add_values<NR, PageElement<T>>(weights, values, stride, count, dim, sums, sums_stride, shrink,
                                   ahead);
}

}  // namespace
}  // namespace winnow::CPU_CAPABILITY
