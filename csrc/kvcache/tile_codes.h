// Quantised pages in a tile. Where the machine multiplies bf16 pairs and the queries are bf16,
// codes become bf16 in registers, which holds each of them exactly, through tables of bytes: 64
// codes at a time take two look-ups for their low and two for their high bytes. Elsewhere they
// become floats (code_lanes.h) and go through the loops of tile_math.h. Scales go into the scores
// and the weights. Included by *_simd.cc only.
#pragma once

#include <type_traits>

#include "common/lanes.h"
#include "kvcache/code_lanes.h"
#include "kvcache/codes.h"
#include "kvcache/page_walk.h"
#include "kvcache/tile_lanes.h"
#include "kvcache/tile_math.h"

namespace winnow::CPU_CAPABILITY {
namespace {

// What the loops over quantised pages are instantiated for: the queries in scratch memory are
// floats or bf16 pairs, whatever they came as.
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
  using Row = std::conditional_t<kInPairs, c10::BFloat16, float>;
  static constexpr bool kCodes = true;
  static constexpr bool kCodePairs = kInPairs;
};
template <typename T>
using PageElement = typename ElementsOf<T>::Page;
template <typename T>
using RowElement = typename ElementsOf<T>::Row;

constexpr int64_t kCodes = 64;  // that become pairs together; queries are padded to as many

inline float scale_of(const float* scales, const int64_t* stride, const Tile& tile, int64_t head) {
  return scales[tile.block * stride[0] + head * stride[1]];
}

// Hidden weights stay -0.
inline void scale_weights(float* weights, int64_t keys, float scale) {
  for (int64_t j = 0; j < keys; j += kLanes) {
    store_lanes(weights + j, load_lanes(weights + j) * scale);
  }
}

// Which code's place in its 64 the i-th bf16 has: the interleaving of low and high bytes goes on
// within every 16.
inline int64_t place_of(int64_t i) {
  return i % 32 / 8 * 16 + i / 32 * 8 + i % 8;
}

#if defined(__AVX512BF16__)
// Low and high bytes of the bf16 of 128 magnitudes.
struct ByteTables {
  __m512i low[2];
  __m512i high[2];
};

template <typename Code>
struct Magnitudes {
  alignas(64) uint8_t low[128];
  alignas(64) uint8_t high[128];

  constexpr Magnitudes() : low(), high() {
    for (int m = 0; m < 128; ++m) {
      uint16_t bits = 0;
      if (std::is_same_v<Code, Float8> && m >= 8) {
        bits = static_cast<uint16_t>((m << 4) + (120 << 7));
        if (m == 127) bits = 0x7fc0;
      } else if (m > 0) {
        int top = 0;
        while (m >> (top + 1)) ++top;
        const int unit = std::is_same_v<Code, Float8> ? -9 : 0;  // subnormal, or a whole number
        bits = static_cast<uint16_t>(((top + unit + 127) << 7) + ((m << (7 - top)) & 0x7f));
      }
      low[m] = static_cast<uint8_t>(bits & 0xff);
      high[m] = static_cast<uint8_t>(bits >> 8);
    }
  }
};

template <typename Code>
inline ByteTables byte_tables() {
  static constexpr Magnitudes<Code> kMagnitudes;
  return {{_mm512_load_si512(kMagnitudes.low), _mm512_load_si512(kMagnitudes.low + 64)},
          {_mm512_load_si512(kMagnitudes.high), _mm512_load_si512(kMagnitudes.high + 64)}};
}

// The bf16 of 64 codes, in the order of place_of.
template <typename Code>
inline void to_pairs(const ByteTables& tables, __m512i codes, __m512i* first, __m512i* second) {
  __m512i magnitude = codes;  // a look-up ignores the sign of an e4m3 code
  if constexpr (std::is_same_v<Code, int8_t>) magnitude = _mm512_abs_epi8(codes);
  const __m512i low = _mm512_permutex2var_epi8(tables.low[0], magnitude, tables.low[1]);
  const __m512i high = _mm512_permutex2var_epi8(tables.high[0], magnitude, tables.high[1]);
  // high | (codes & 0x80)
  const __m512i signed_high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(-128), 0xf8);
  *first = _mm512_unpacklo_epi8(low, signed_high);
  *second = _mm512_unpackhi_epi8(low, signed_high);
}

inline __m512i load_codes_512(const void* p, int64_t left) {
  if (left >= kCodes) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi8((__mmask64{1} << left) - 1, p);
}

// dot_rows of tile_math.h for codes.
template <int NR, typename Code>
void dot_code_rows(const c10::BFloat16* q, int64_t q_stride, const Code* keys, int64_t key_stride,
                   int64_t count, int64_t dim, float* scores, Ahead ahead, Ahead again) {
  constexpr int NK = kWide / NR;
  const ByteTables tables = byte_tables<Code>();
  for (int64_t j = 0; j < count; j += NK) {
    const Code* k[NK];
    for (int n = 0; n < NK; ++n) {
      k[n] = keys + smaller(j + n, count - 1) * key_stride;
    }
    FloatPart sums[kWide];
#pragma GCC unroll 16
    for (int i = 0; i < kWide; ++i) sums[i] = FloatPart{};
    for (int64_t d = 0; d < dim; d += kCodes) {
      ahead.fetch(NK * kCodes);
      again.fetch(NK * kCodes);
#pragma GCC unroll 16
      for (int n = 0; n < NK; ++n) {
        __m512i first;
        __m512i second;
        to_pairs<Code>(tables, load_codes_512(k[n] + d, dim - d), &first, &second);
#pragma GCC unroll 16
        for (int r = 0; r < NR; ++r) {
          const c10::BFloat16* row = q + r * q_stride + d;
          __m512 sum = (__m512)sums[r * NK + n];
          sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(row), (__m512bh)first);
          sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(row + 32), (__m512bh)second);
          sums[r * NK + n] = (FloatPart)sum;
        }
      }
    }
    float products[kWide];
    store_part(products, sum_each(sums));
    for (int r = 0; r < NR; ++r) {
      std::memcpy(scores + r * kKeys + j, products + r * NK, NK * sizeof(float));
    }
  }
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

// add_values of tile_math.h for codes: two keys at a time, whose codes of one column are a pair.
// Weights are rounded to bf16, as the outputs are.
template <int NR, typename Code>
void add_code_values(const float* weights, const Code* values, int64_t stride, int64_t count,
                     int64_t dim, float* sums, int64_t sums_stride, const float* shrink,
                     Ahead ahead) {
  const ByteTables tables = byte_tables<Code>();
  alignas(64) uint32_t pairs[NR][kKeys / 2];
  for (int r = 0; r < NR; ++r) {
    for (int64_t j = 0; j < count; j += 2 * kLanes) {
      const float* w = weights + r * kKeys + j;
      // Behind the last key lie what other tiles left.
      const auto low = static_cast<__mmask16>(count - j >= 16 ? 0xffff : (1 << (count - j)) - 1);
      const int64_t rest = larger(0, count - j - 16);
      const auto high = static_cast<__mmask16>(rest >= 16 ? 0xffff : (1 << rest) - 1);
      _mm512_store_si512(pairs[r] + j / 2,
                         (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high, w + 16),
                                                      _mm512_maskz_loadu_ps(low, w)));
    }
  }
  for (int64_t d = 0; d < dim; d += kCodes) {
    const int64_t left = dim - d;
    __m512 strip[NR][4];
#pragma GCC unroll 16
    for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) strip[r][c] = _mm512_setzero_ps();
    }
    for (int64_t j = 0; j < count; j += 2) {
      ahead.fetch(kCodes);
      if (j + 1 < count) ahead.fetch(kCodes);
      const Code* row = values + j * stride + d;
      const __m512i even = load_codes_512(row, left);
      const __m512i odd = j + 1 < count ? load_codes_512(row + stride, left) : __m512i{};
      __m512i v[4];  // columns 4 c to 4 c + 3 of every 16
      to_pairs<Code>(tables, _mm512_unpacklo_epi8(even, odd), &v[0], &v[1]);
      to_pairs<Code>(tables, _mm512_unpackhi_epi8(even, odd), &v[2], &v[3]);
#pragma GCC unroll 16
      for (int r = 0; r < NR; ++r) {
        const __m512i weight = _mm512_set1_epi32(static_cast<int>(pairs[r][j / 2]));
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
          strip[r][c] = _mm512_dpbf16_ps(strip[r][c], (__m512bh)weight, (__m512bh)v[c]);
        }
      }
    }
    for (int r = 0; r < NR; ++r) {
      // Quarters of registers, transposed.
      const __m512 a = _mm512_shuffle_f32x4(strip[r][0], strip[r][1], 0x44);
      const __m512 b = _mm512_shuffle_f32x4(strip[r][0], strip[r][1], 0xee);
      const __m512 c = _mm512_shuffle_f32x4(strip[r][2], strip[r][3], 0x44);
      const __m512 e = _mm512_shuffle_f32x4(strip[r][2], strip[r][3], 0xee);
      const __m512 columns[4] = {_mm512_shuffle_f32x4(a, c, 0x88), _mm512_shuffle_f32x4(a, c, 0xdd),
                                 _mm512_shuffle_f32x4(b, e, 0x88),
                                 _mm512_shuffle_f32x4(b, e, 0xdd)};
      for (int64_t c16 = 0; c16 < 4 && c16 * kLanes < left; ++c16) {
        auto part = (FloatPart)columns[c16];
        if (__builtin_expect(any_nan(part), 0)) {
          const int64_t n = smaller(kLanes, left - c16 * kLanes);
          part = careful_sum(weights + r * kKeys, count, [&](int64_t j) {
            return load_part(values + j * stride + d + c16 * kLanes, n);
          });
        }
        float* sum = sums + r * sums_stride + d + c16 * kLanes;
        store_part(sum, fma_part(load_part(sum), broadcast_part(shrink[r]), part));
      }
    }
  }
}
#endif

// dot_rows and add_values for whatever T stands for.
template <int NR, typename T>
inline void dot_keys(const RowElement<T>* q, int64_t q_stride, const PageElement<T>* keys,
                     int64_t key_stride, int64_t count, int64_t dim, float* scores, Ahead ahead,
                     Ahead again) {
#if defined(__AVX512BF16__)
  if constexpr (ElementsOf<T>::kCodePairs) {
    return dot_code_rows<NR>(q, q_stride, keys, key_stride, count, dim, scores, ahead, again);
  } else  // NOLINT
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
  } else  // NOLINT
#endif
    add_values<NR, PageElement<T>>(weights, values, stride, count, dim, sums, sums_stride, shrink,
                                   ahead);
}

}  // namespace
}  // namespace winnow::CPU_CAPABILITY
