// Weights as 63-bit fixed-point integers, eight lanes at a time. Integer sums are associative, so a
// cumulative weight is the same for any number of threads and any instruction set, and a particle
// whose cumulative weight does not grow can never be chosen. What is rounded (weight to integer,
// integer to double) rounds the same everywhere: no fused multiply-add, one order.
//
// Included by *_simd.cc only, hence internal linkage.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/lanes.h"
#include "common/philox.h"

namespace winnow {
namespace {

constexpr int kWide = 8;
typedef double DoublePart __attribute__((vector_size(64 / kParts)));
typedef int64_t LongPart __attribute__((vector_size(64 / kParts)));
typedef uint64_t WordPart __attribute__((vector_size(64 / kParts)));
typedef float FloatHalf __attribute__((vector_size(32 / kParts)));

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
inline f64x8 to_double(u64x8 x) {
  f64x8 r;
  for (int p = 0; p < kParts; ++p) {
#if defined(__AVX512DQ__) || defined(__aarch64__)
    r.part[p] = __builtin_convertvector(x.part[p], DoublePart);
#else
    // The halves as mantissas of 2^84 and 2^52: one addition rounds, the others are exact.
    const DoublePart high = (DoublePart)((x.part[p] >> 32) | (uint64_t{0x453} << 52));
    const DoublePart low = (DoublePart)((x.part[p] & 0xffffffffu) | (uint64_t{0x433} << 52));
    r.part[p] = (high - (0x1p84 + 0x1p52)) + low;
#endif
  }
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

inline uint64_t multiply_high(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
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

// philox_bits for kLanes elements at once, written so that the compiler vectorises over the lanes.
inline void philox_lanes(uint64_t seed, uint64_t row, const uint64_t* element, uint64_t* bits) {
  uint64_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  constexpr uint64_t kLow = 0xffffffffu;
  for (int i = 0; i < kLanes; ++i) {
    c0[i] = element[i] & kLow;
    c1[i] = element[i] >> 32;
    c2[i] = row & kLow;
    c3[i] = row >> 32;
  }
  uint64_t k0 = seed & kLow;
  uint64_t k1 = seed >> 32;
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * c0[i];
      const uint64_t p1 = uint64_t{0xCD9E8D57u} * c2[i];
      c0[i] = (p1 >> 32) ^ c1[i] ^ k0;
      c2[i] = (p0 >> 32) ^ c3[i] ^ k1;
      c1[i] = p1 & kLow;
      c3[i] = p0 & kLow;
    }
    k0 = (k0 + 0x9E3779B9u) & kLow;
    k1 = (k1 + 0xBB67AE85u) & kLow;
  }
  for (int i = 0; i < kLanes; ++i) bits[i] = (c1[i] << 32) | c0[i];
}

}  // namespace
}  // namespace winnow
