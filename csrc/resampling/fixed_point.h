// Weights as 63-bit fixed-point integers, eight lanes at a time. Integer sums are associative, so a
// cumulative weight is the same for any number of threads and any instruction set, and a particle
// whose cumulative weight does not grow can never be chosen. What is rounded (weight to integer,
// integer to double) rounds the same everywhere: no fused multiply-add, one order.
//
// Included by *_simd.cc only, hence internal linkage.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "common/lanes.h"
#include "common/philox.h"
#include "resampling/exact.h"

namespace winnow {
namespace {

constexpr int kWide = 8;
typedef double DoublePart __attribute__((vector_size(64 / kParts)));
typedef int64_t LongPart __attribute__((vector_size(64 / kParts)));
typedef uint64_t WordPart __attribute__((vector_size(64 / kParts)));
typedef float FloatHalf __attribute__((vector_size(32 / kParts)));
typedef int32_t IntHalf __attribute__((vector_size(32 / kParts)));

struct f64x8 {
  DoublePart part[kParts];
};
struct u64x8 {
  WordPart part[kParts];
};

inline f64x8 wide(double x) {
  f64x8 r;
  for (int p = 0; p < kParts; ++p) r.part[p] = DoublePart{} + x;
  return r;
}

inline f64x8 load_wide(const double* from) {
  f64x8 r;
  std::memcpy(&r, from, sizeof r);
  return r;
}

inline f64x8 load_wide(const float* from) {
  FloatHalf half[kParts];
  std::memcpy(half, from, sizeof half);
  f64x8 r;
  for (int p = 0; p < kParts; ++p) r.part[p] = __builtin_convertvector(half[p], DoublePart);
  return r;
}

inline u64x8 load_wide(const uint64_t* from) {
  u64x8 r;
  std::memcpy(&r, from, sizeof r);
  return r;
}

inline f64x8 operator+(f64x8 a, f64x8 b) {
  for (int p = 0; p < kParts; ++p) a.part[p] += b.part[p];
  return a;
}

inline f64x8 operator-(f64x8 a, f64x8 b) {
  for (int p = 0; p < kParts; ++p) a.part[p] -= b.part[p];
  return a;
}

inline f64x8 operator*(f64x8 a, f64x8 b) {
  for (int p = 0; p < kParts; ++p) a.part[p] *= b.part[p];
  return a;
}

inline double sum_wide(f64x8 v) {
  double x[kWide];
  std::memcpy(x, &v, sizeof v);
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

inline uint64_t sum_wide(u64x8 v) {
  uint64_t x[kWide];
  std::memcpy(x, &v, sizeof v);
  uint64_t sum = 0;
  for (const uint64_t value : x) sum += value;
  return sum;
}

// 1.0 where the mask is set, else 0.0.
inline DoublePart one_where(LongPart mask) {
  const DoublePart one = DoublePart{} + 1.0;
  return (DoublePart)(mask & (LongPart)one);
}

// Rounded to the nearest integer, ties to even, for |x| < 2^51.
inline DoublePart nearest(DoublePart x) {
  const DoublePart magic = DoublePart{} + 0x1.8p52;
  return (x + magic) - magic;
}

inline DoublePart floor_part(DoublePart x) {
  const DoublePart r = nearest(x);
  return r - one_where((LongPart)(r > x));
}

// Integer-valued doubles, |x| < 2^51, to integers.
inline LongPart small_to_long(DoublePart x) {
  const DoublePart magic = DoublePart{} + 0x1.8p52;
  return (LongPart)(x + magic) - (LongPart)magic;
}

// Truncated; 0 <= x < 2^63. AVX2 and SSE lack the instruction: two halves of 32 bits, each exact.
inline u64x8 to_words(f64x8 x) {
  u64x8 r;
  for (int p = 0; p < kParts; ++p) {
#if defined(__AVX512DQ__) || defined(__aarch64__)
    r.part[p] = (WordPart) __builtin_convertvector(x.part[p], LongPart);
#else
    const DoublePart high = floor_part(x.part[p] * 0x1p-32);
    const DoublePart low = floor_part(x.part[p] - high * 0x1p32);
    r.part[p] = (WordPart)((small_to_long(high) << 32) + small_to_long(low));
#endif
  }
  return r;
}

// Correctly rounded.
inline DoublePart to_double(WordPart x) {
#if defined(__AVX512DQ__) || defined(__aarch64__)
  return __builtin_convertvector(x, DoublePart);
#else
  // The halves as mantissas of 2^84 and 2^52: one addition rounds, the others are exact.
  const DoublePart high = (DoublePart)((x >> 32) | (uint64_t{0x453} << 52));
  const DoublePart low = (DoublePart)((x & 0xffffffffu) | (uint64_t{0x433} << 52));
  return (high - (0x1p84 + 0x1p52)) + low;
#endif
}

inline f64x8 to_double(u64x8 x) {
  f64x8 r;
  for (int p = 0; p < kParts; ++p) r.part[p] = to_double(x.part[p]);
  return r;
}

// exp(x) for x <= 0 within 2 ulp of double, 0 below -708 (no subnormals) and for NaN.
inline f64x8 exp_wide(f64x8 x) {
  static constexpr double kInverseFactorial[] = {1.0,
                                                 1.0,
                                                 1.0 / 2,
                                                 1.0 / 6,
                                                 1.0 / 24,
                                                 1.0 / 120,
                                                 1.0 / 720,
                                                 1.0 / 5040,
                                                 1.0 / 40320,
                                                 1.0 / 362880,
                                                 1.0 / 3628800,
                                                 1.0 / 39916800,
                                                 1.0 / 479001600,
                                                 1.0 / 6227020800.0};
  f64x8 r;
  for (int p = 0; p < kParts; ++p) {
    const DoublePart bound = DoublePart{} - 708.0;
    const LongPart valid = (LongPart)(x.part[p] >= bound);
    const DoublePart clamped =
        (DoublePart)((valid & (LongPart)x.part[p]) | (~valid & (LongPart)bound));
    const DoublePart n = nearest(clamped * 1.44269504088896340736);
    // ln 2 in two parts; the first has 33 bits, so that n times it is exact.
    const DoublePart t =
        (clamped - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
    DoublePart sum = DoublePart{} + kInverseFactorial[13];
    for (int degree = 12; degree >= 0; --degree) sum = sum * t + kInverseFactorial[degree];
    const DoublePart scale = (DoublePart)((small_to_long(n) + 1023) << 52);
    r.part[p] = (DoublePart)(valid & (LongPart)(sum * scale));
  }
  return r;
}

// The product of the low halves of each 64-bit lane, whatever the high halves hold.
inline WordPart multiply_halves(WordPart a, WordPart b) {
#if defined(__AVX512F__)
  return (WordPart)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (WordPart)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (WordPart)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// multiply_high of every lane.
inline u64x8 multiply_high(u64x8 a, u64x8 b) {
  u64x8 r;
  for (int p = 0; p < kParts; ++p) {
    const WordPart x = a.part[p];
    const WordPart y = b.part[p];
    const WordPart low = multiply_halves(x, y);
    const WordPart middle = multiply_halves(x >> 32, y) + (low >> 32);
    const WordPart other = multiply_halves(x, y >> 32) + (middle & 0xffffffffu);
    r.part[p] = multiply_halves(x >> 32, y >> 32) + (middle >> 32) + (other >> 32);
  }
  return r;
}

// first, first + 1, ...
inline u64x8 count_from(uint64_t first) {
  static constexpr uint64_t kIndex[kWide] = {0, 1, 2, 3, 4, 5, 6, 7};
  u64x8 r = load_wide(kIndex);
  for (int p = 0; p < kParts; ++p) r.part[p] += first;
  return r;
}

// 2^exponent.
inline double power_of_two(int64_t exponent) {
  const int64_t bits = (exponent + 1023) << 52;
  double r;
  std::memcpy(&r, &bits, sizeof r);
  return r;
}

// floor(log2(x)) of a positive normal number.
inline int64_t exponent_of(double x) {
  int64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (bits >> 52) - 1023;
}

// philox_bits for kWide pairs of row and element. Counters lie in the low half of their lane and
// are never masked: the product reads no more than that.
inline u64x8 philox_wide(uint64_t seed, u64x8 row, u64x8 element) {
  u64x8 r;
  for (int p = 0; p < kParts; ++p) {
    WordPart c0 = element.part[p];
    WordPart c1 = c0 >> 32;
    WordPart c2 = row.part[p];
    WordPart c3 = c2 >> 32;
    auto k0 = static_cast<uint32_t>(seed);
    auto k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const WordPart p0 = multiply_halves(c0, WordPart{} + 0xD2511F53u);
      const WordPart p1 = multiply_halves(c2, WordPart{} + 0xCD9E8D57u);
      c0 = (p1 >> 32) ^ c1 ^ uint64_t{k0};
      c2 = (p0 >> 32) ^ c3 ^ uint64_t{k1};
      c1 = p1;
      c3 = p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    r.part[p] = (c1 << 32) | (c0 & 0xffffffffu);
  }
  return r;
}

inline u64x8 wide_word(uint64_t x) {
  u64x8 r;
  for (int p = 0; p < kParts; ++p) r.part[p] = WordPart{} + x;
  return r;
}

// log(x) of positive normal numbers within 2 ulp: x = 2^e m with m in [sqrt(1/2), sqrt(2)), then
// 2 atanh((m - 1) / (m + 1)).
inline f64x8 log_wide(f64x8 x) {
  static constexpr double kInverseOdd[] = {1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9,  1.0 / 11,
                                           1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21};
  constexpr int64_t kRootHalf = 0x3fe6a09e667f3bcd;
  f64x8 r;
  for (int p = 0; p < kParts; ++p) {
    const LongPart shifted = (LongPart)x.part[p] - kRootHalf;
    const LongPart exponent = shifted >> 52;
    const DoublePart m = (DoublePart)((shifted & 0xfffffffffffff) + kRootHalf);
    // A small integer to double: its bits below a large power of two.
    const DoublePart magic = DoublePart{} + 0x1.8p52;
    const DoublePart e = (DoublePart)((LongPart)magic + exponent) - magic;
    const DoublePart s = (m - 1.0) / (m + 1.0);
    const DoublePart z = s * s;
    DoublePart sum = DoublePart{} + kInverseOdd[9];
    for (int i = 8; i >= 0; --i) sum = sum * z + kInverseOdd[i];
    const DoublePart tail = s * z * sum + e * 0.5 * 1.90821492927058770002e-10;
    r.part[p] = e * 6.93147180369123816490e-01 + 2.0 * (s + tail);
  }
  return r;
}

inline double log_of(double x) {
  const f64x8 v = log_wide(wide(x));
  double r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}

}  // namespace
}  // namespace winnow
