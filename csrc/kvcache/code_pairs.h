// Codes as 16-bit numbers, 64 at a time: int8 codes become integers, which meet queries and weights
// of 16 bits in integer arithmetic; e4m3 codes become bf16, which holds each of them exactly,
// through tables of bytes. Included by *_simd.cc only.
#pragma once

#include "common/lanes.h"
#include "kvcache/codes.h"
#include "kvcache/page_walk.h"
#include "kvcache/tile_lanes.h"

namespace winnow::CPU_CAPABILITY {
namespace {

constexpr int64_t kCodes = 64;       // that become pairs together; queries are padded to as many
constexpr int64_t kMostWords = 256;  // of a query: more could overflow a sum of integers

// A query in pairs with int8 codes: integers of `unit` each, and what the sum of their products
// with codes + 128 is too large by.
struct WordRow {
  float unit;
  int32_t excess;
};

// Which code's place in its 64 the i-th number of a pair of registers has: bytes are widened within
// every 16.
inline int64_t place_of(int64_t i) {
  return i % 32 / 8 * 16 + i / 32 * 8 + i % 8;
}

#if defined(__AVX512BF16__)
// Queries as integers of 16 bits; a row that is not finite gets a unit of NaN.
inline WordRow to_words(const float* from, int64_t padded, int16_t* to) {
  __m512 top = _mm512_setzero_ps();
  __m512 sum = top;
  for (int64_t i = 0; i < padded; i += kLanes) {
    const __m512 magnitude = _mm512_abs_ps(_mm512_loadu_ps(from + i));
    top = _mm512_max_ps(top, magnitude);
    sum += magnitude * 0.0f;  // NaN for what is not finite
  }
  const float unit = _mm512_reduce_max_ps(top) / 32767.0f;
  if (any_nan((FloatPart)sum)) {
    std::memset(to, 0, static_cast<size_t>(padded) * sizeof *to);
    return {__builtin_nanf(""), 0};
  }
  const __m512 factor = _mm512_set1_ps(unit > 0.0f ? 32767.0f / _mm512_reduce_max_ps(top) : 0.0f);
  __m512i total = _mm512_setzero_si512();
  for (int64_t i = 0; i < padded; i += kLanes) {
    const __m512i word = _mm512_cvtps_epi32(_mm512_loadu_ps(from + i) * factor);
    total = _mm512_add_epi32(total, word);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtepi32_epi16(word));
  }
  return {unit, 128 * _mm512_reduce_add_epi32(total)};
}

// Low and high bytes of the bf16 of the 128 magnitudes of e4m3.
struct Magnitudes {
  alignas(64) uint8_t low[128];
  alignas(64) uint8_t high[128];

  constexpr Magnitudes() : low(), high() {
    for (int m = 0; m < 128; ++m) {
      int bits = (m << 4) + (120 << 7);
      if (m == 127) bits = 0x7fc0;
      if (m < 8) {  // subnormal: m times 2^-9
        const int top = m < 2 ? 0 : m < 4 ? 1 : 2;
        bits = m == 0 ? 0 : ((top - 9 + 127) << 7) + ((m << (7 - top)) & 0x7f);
      }
      low[m] = static_cast<uint8_t>(bits & 0xff);
      high[m] = static_cast<uint8_t>(bits >> 8);
    }
  }
};

// How 64 codes become two registers of 16-bit numbers, in the order of place_of, and what those are
// multiplied with.
template <typename Code>
struct Pairs;

template <>
struct Pairs<Float8> {
  using Element = c10::BFloat16;
  __m512i low[2];
  __m512i high[2];

  Pairs() {
    static constexpr Magnitudes kMagnitudes;
    for (int i = 0; i < 2; ++i) {
      low[i] = _mm512_load_si512(kMagnitudes.low + 64 * i);
      high[i] = _mm512_load_si512(kMagnitudes.high + 64 * i);
    }
  }
  // The look-ups ignore the sign of a code.
  void widen(__m512i codes, __m512i* first, __m512i* second) const {
    const __m512i l = _mm512_permutex2var_epi8(low[0], codes, low[1]);
    const __m512i h = _mm512_permutex2var_epi8(high[0], codes, high[1]);
    const __m512i s = _mm512_ternarylogic_epi32(h, codes, _mm512_set1_epi8(-128), 0xf8);
    *first = _mm512_unpacklo_epi8(l, s);  // s = h | (codes & 0x80)
    *second = _mm512_unpackhi_epi8(l, s);
  }
  static __m512i multiply_add(__m512i sum, __m512i a, __m512i b) {
    // The intrinsics get copies of the sums from GCC 12, which then spills them.
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
  using Sum = FloatPart;
  static FloatPart to_floats(FloatPart sum) { return sum; }
};

// Codes + 128, which need no sign: what that adds is known beforehand.
template <>
struct Pairs<int8_t> {
  using Element = int16_t;

  void widen(__m512i codes, __m512i* first, __m512i* second) const {
    const __m512i bytes = _mm512_xor_si512(codes, _mm512_set1_epi8(-128));
    *first = _mm512_unpacklo_epi8(bytes, _mm512_setzero_si512());
    *second = _mm512_unpackhi_epi8(bytes, _mm512_setzero_si512());
  }
  static __m512i multiply_add(__m512i sum, __m512i a, __m512i b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
  using Sum = IntPart;
  static FloatPart to_floats(IntPart sum) { return (FloatPart)_mm512_cvtepi32_ps((__m512i)sum); }
};

inline __m512i load_codes_512(const void* p, int64_t left) {
  if (left >= kCodes) return _mm512_loadu_si512(p);
  return _mm512_maskz_loadu_epi8((__mmask64{1} << left) - 1, p);
}

// The weights of a row as 16-bit numbers, pairs of neighbouring keys in a word, 0 behind the last
// key; returns what their products are to be multiplied with, and of integers their sum.
inline float weigh_pairs(Pairs<Float8>, const float* weights, int64_t count, uint32_t* words,
                         float* excess) {
  for (int64_t j = 0; j < count; j += 2 * kLanes) {
    const auto mask = [&](int64_t left) {
      return static_cast<__mmask16>(left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1);
    };
    const __m512 low = _mm512_maskz_loadu_ps(mask(count - j), weights + j);
    const __m512 high = _mm512_maskz_loadu_ps(mask(count - j - 16), weights + j + 16);
    _mm512_store_si512(words + j / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  *excess = 0.0f;
  return 1.0f;
}

inline float weigh_pairs(Pairs<int8_t>, const float* weights, int64_t count, uint32_t* words,
                         float* excess) {
  __m512 part[kKeys / kLanes];
  __m512 top = _mm512_setzero_ps();
  __m512 sum = top;
#pragma GCC unroll 4
  for (int i = 0; i < kKeys / kLanes; ++i) {
    const int64_t left = count - i * kLanes;
    const auto mask = static_cast<__mmask16>(left >= 16 ? 0xffff : left <= 0 ? 0 : (1 << left) - 1);
    part[i] = _mm512_maskz_loadu_ps(mask, weights + i * kLanes);
    top = _mm512_max_ps(top, part[i]);
    sum += part[i];
  }
  const float highest = _mm512_reduce_max_ps(top);
  const __m512 factor = _mm512_set1_ps(highest > 0.0f ? 32767.0f / highest : 0.0f);
  __m512i total = _mm512_setzero_si512();
#pragma GCC unroll 4
  for (int i = 0; i < kKeys / kLanes; ++i) {
    const __m512i word = _mm512_cvtps_epi32(part[i] * factor);
    total = _mm512_add_epi32(total, word);
    _mm256_store_si256(reinterpret_cast<__m256i*>(words) + i, _mm512_cvtepi32_epi16(word));
  }
  *excess = 128.0f * static_cast<float>(_mm512_reduce_add_epi32(total));
  return any_nan((FloatPart)sum) ? __builtin_nanf("") : highest / 32767.0f;
}
#endif

}  // namespace
}  // namespace winnow::CPU_CAPABILITY
