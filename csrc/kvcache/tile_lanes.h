// One register of floats, and what the tiles of an attention are made of: loads that widen, fused
// multiply-adds, and the sums of as many accumulators as a register has lanes in a few shuffles.
// Included by *_simd.cc only. The compiler's vector types carry the arithmetic; intrinsics stand
// where an instruction has no other name. Fused multiply-adds make the last bit depend on the
// instruction set.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common/lanes.h"

namespace winnow {
namespace {

constexpr int kWide = kLanes / kParts;  // floats in a register: 16, 8 or 4

inline FloatPart fma_part(FloatPart a, FloatPart b, FloatPart c) {
#if defined(__AVX512F__)
  return (FloatPart)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (FloatPart)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (FloatPart)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// x - 0 is x for every x, so nothing is left but the broadcast; x + 0 would turn -0 into 0.
inline FloatPart broadcast_part(float x) {
  return x - FloatPart{};
}

inline FloatPart load_part(const float* p) {
  FloatPart v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// The compiler's own conversion of shorts goes through half registers.
inline FloatPart load_part(const c10::BFloat16* p) {
#if defined(__AVX512F__)
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (FloatPart)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
#elif defined(__AVX2__)
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (FloatPart)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
#else
  ShortPart raw;
  std::memcpy(&raw, p, sizeof raw);
  return (FloatPart)(__builtin_convertvector(raw, BitsPart) << 16);
#endif
}

inline FloatPart load_part(const c10::Half* p) {
#if defined(__AVX512F__)
  return (FloatPart)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (FloatPart)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  // A multiplication re-biases the exponent: exact for every half, subnormal, infinite and NaN.
  ShortPart raw;
  std::memcpy(&raw, p, sizeof raw);
  const IntPart bits = (IntPart) __builtin_convertvector(raw, BitsPart);
  const IntPart magnitude = (bits & 0x7fff) << 13;
  const IntPart finite = (IntPart)((FloatPart)magnitude * 0x1p112f);
  const IntPart special = magnitude + (224 << 23);
  const IntPart chosen = magnitude > ((0x7c00 << 13) - 1) ? special : finite;
  return (FloatPart)(chosen | ((bits & 0x8000) << 16));
#endif
}

// The first n < kWide elements, the others 0.
template <typename T>
inline FloatPart load_part(const T* p, int64_t n) {
  alignas(64) unsigned char raw[kWide * sizeof(T)] = {};
  std::memcpy(raw, p, static_cast<size_t>(n) * sizeof(T));
  return load_part(reinterpret_cast<const T*>(raw));
}

inline void store_part(float* p, FloatPart v) {
  std::memcpy(p, &v, sizeof v);
}

// Lane i of the result is the sum of v[i].
#if defined(__AVX512F__)
template <typename Part>  // FloatPart or IntPart
inline Part sum_each(const Part (&v)[kWide]) {
  const auto add = [](__m512 a, __m512 b) { return (__m512)((Part)a + (Part)b); };
  __m512 quad[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = (__m512)v[4 * i];
    const __m512 b = (__m512)v[4 * i + 1];
    const __m512 c = (__m512)v[4 * i + 2];
    const __m512 d = (__m512)v[4 * i + 3];
    const auto ab = (__m512d)add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const auto cd = (__m512d)add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    quad[i] = add((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
  }
  const __m512 low = add(_mm512_shuffle_f32x4(quad[0], quad[1], 0x44),
                         _mm512_shuffle_f32x4(quad[0], quad[1], 0xee));
  const __m512 high = add(_mm512_shuffle_f32x4(quad[2], quad[3], 0x44),
                          _mm512_shuffle_f32x4(quad[2], quad[3], 0xee));
  return (Part)add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}
#else
inline FloatPart sum_each(const FloatPart (&v)[kWide]) {
#if defined(__AVX2__)
  __m256 quad[2];
  for (int i = 0; i < 2; ++i) {
    const __m256 ab = _mm256_hadd_ps((__m256)v[4 * i], (__m256)v[4 * i + 1]);
    const __m256 cd = _mm256_hadd_ps((__m256)v[4 * i + 2], (__m256)v[4 * i + 3]);
    quad[i] = _mm256_hadd_ps(ab, cd);
  }
  return (FloatPart)(_mm256_permute2f128_ps(quad[0], quad[1], 0x20) +
                     _mm256_permute2f128_ps(quad[0], quad[1], 0x31));
#elif defined(__aarch64__)
  const float32x4_t ab = vpaddq_f32((float32x4_t)v[0], (float32x4_t)v[1]);
  const float32x4_t cd = vpaddq_f32((float32x4_t)v[2], (float32x4_t)v[3]);
  return (FloatPart)vpaddq_f32(ab, cd);
#elif defined(__x86_64__)
  __m128 a = (__m128)v[0], b = (__m128)v[1], c = (__m128)v[2], d = (__m128)v[3];
  _MM_TRANSPOSE4_PS(a, b, c, d);
  return (FloatPart)((a + b) + (c + d));
#else
  FloatPart sums;
  for (int i = 0; i < kWide; ++i) {
    sums[i] = 0.0f;
    for (int lane = 0; lane < kWide; ++lane) sums[i] += v[i][lane];
  }
  return sums;
#endif
}
#endif

inline bool any_nan(FloatPart v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q) != 0;
#else
  const IntPart nan = (IntPart)(v != v);
  uint64_t words[sizeof nan / 8];
  std::memcpy(words, &nan, sizeof nan);
  uint64_t found = 0;
  for (uint64_t word : words) found |= word;
  return found != 0;
#endif
}

// exp(x) for x <= 0 or NaN, as exp_lanes has it; elsewhere than on AVX-512 the same.
WINNOW_LANES f32x16 exp_below(f32x16 x) {
#if defined(__AVX512F__)
  const auto v = (__m512)x.part[0];
  const auto constant = [](float c) { return _mm512_set1_ps(c); };
  const __m512 n = _mm512_roundscale_ps(v * constant(1.44269504088896341f), 8);
  __m512 r = _mm512_fnmadd_ps(n, constant(0.693359375f), v);
  r = _mm512_fnmadd_ps(n, constant(-2.12194440e-4f), r);
  __m512 p = constant(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, constant(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, constant(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, constant(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, constant(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, constant(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, r * r, r) + constant(1.0f);
  const __mmask16 large = _mm512_cmp_ps_mask(v, constant(-87.33f), _CMP_NLT_UQ);
  f32x16 y;
  y.part[0] = (FloatPart)_mm512_maskz_scalef_ps(large, p, n);
  return y;
#else
  return exp_lanes(x);
#endif
}

// Sum and maximum over sixteen lanes, halving; faster than lanes.h's, which keep one order.
inline float halving_sum(f32x16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v.part[0]);
#else
  FloatPart part = v.part[0];
  for (int i = 1; i < kParts; ++i) part += v.part[i];
  float x[kWide];
  store_part(x, part);
#pragma GCC unroll 4
  for (int width = kWide / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  }
  return x[0];
#endif
}

inline float halving_max(f32x16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v.part[0]);
#else
  FloatPart part = v.part[0];
  for (int i = 1; i < kParts; ++i) part = v.part[i] > part ? v.part[i] : part;
  float x[kWide];
  store_part(x, part);
#pragma GCC unroll 4
  for (int width = kWide / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] = x[i + width] > x[i] ? x[i + width] : x[i];
  }
  return x[0];
#endif
}

// Rounds to nearest even; NaN stays NaN.
// No numbers go to no memory: attention_mass asks for weights alone, without values.
inline void store_row(float* to, const float* from, int64_t n) {
  if (n > 0) std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
}

inline void store_row(c10::BFloat16* to, const float* from, int64_t n) {
  auto* out = reinterpret_cast<uint16_t*>(to);
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}

inline uint16_t half_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (bits < 0x38800000u) {
    // Subnormal: at 0.5 a float's last bit is worth a half's, so the addition rounds.
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof bits);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  const uint32_t rounded = bits + 0xfffu + ((bits >> 13) & 1u) - (112u << 23);
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

inline void store_row(c10::Half* to, const float* from, int64_t n) {
  auto* out = reinterpret_cast<uint16_t*>(to);
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < n; ++i) out[i] = half_bits(from[i]);
}

}  // namespace
}  // namespace winnow
