// exp2 and transposition for the tiles, where at::vec has no inline form.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace winnow::CPU_CAPABILITY {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

template <typename Acc>
using VecOf = at::vec::Vectorized<Acc>;

// The larger; NaN where a is NaN.
template <typename Acc>
inline VecOf<Acc> larger_lanes(const VecOf<Acc>& a, const VecOf<Acc>& b) {
  return at::vec::clamp_min(a, b);
}

// x in the lanes whose interval [begin, end) holds `at`, else `other`.
template <typename Vec, typename T>
inline Vec where_holds(const Vec& begin, const Vec& end, T at, const Vec& x, const Vec& other) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) {
    const __m512 place = _mm512_set1_ps(at);
    const __mmask16 begun = _mm512_cmp_ps_mask(begin, place, _CMP_LE_OQ);
    const __mmask16 holds = _mm512_mask_cmp_ps_mask(begun, place, end, _CMP_LT_OQ);
    return _mm512_mask_mov_ps(other, holds, x);
  }
#endif
  return Vec::blendv(other, x, (begin <= Vec(at)) & (Vec(at) < end));
}

// 2^r for |r| <= 1/2 within 2e-9 before rounding (minimax polynomial of degree 6, exactly 1 at 0).
template <typename Vec>
inline Vec exp2_fraction(const Vec& r) {
  Vec p = Vec(1.534580804e-4f);
  p = at::vec::fmadd(p, r, Vec(1.339993090e-3f));
  p = at::vec::fmadd(p, r, Vec(9.618489072e-3f));
  p = at::vec::fmadd(p, r, Vec(5.550328642e-2f));
  p = at::vec::fmadd(p, r, Vec(2.402264625e-1f));
  p = at::vec::fmadd(p, r, Vec(6.931471825e-1f));
  return at::vec::fmadd(p, r, Vec(1.0f));
}

// 2^x, 0 below -126 (no subnormals) and for -inf, NaN for NaN. Scores are measured from their row's
// maximum, so large positive arguments do not occur outside of masked lanes.
#if defined(__AVX512F__)
inline VecOf<float> exp2_lanes(const VecOf<float>& x) {
  const __m512 n = _mm512_roundscale_ps(x, 0);
  const VecOf<float> p = exp2_fraction(x - VecOf<float>(n));
  const __mmask16 kept = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(kept, p, n);
}
#elif defined(__AVX2__)
inline VecOf<float> exp2_lanes(const VecOf<float>& x) {
  const __m256 bounded = _mm256_min_ps(_mm256_set1_ps(127.0f), x);  // keeps NaN
  const __m256 n = _mm256_round_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const VecOf<float> p = exp2_fraction(VecOf<float>(bounded) - VecOf<float>(n));
  const __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  const __m256 kept = _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ);
  return _mm256_and_ps(kept, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power)));
}
#else
inline VecOf<float> exp2_lanes(const VecOf<float>& x) {
  constexpr int kSize = VecOf<float>::size();
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  float value[kSize];
  float fraction[kSize];
  int32_t power[kSize];
  x.store(value);
  for (int i = 0; i < kSize; ++i) {
    const float bounded = value[i] > 127.0f ? 127.0f : value[i] < -127.0f ? -127.0f : value[i];
    const float n = (bounded + kMagic) - kMagic;
    fraction[i] = bounded - n;
    power[i] = n == n ? static_cast<int32_t>(n) : 0;
  }
  exp2_fraction(VecOf<float>::loadu(fraction)).store(fraction);
  for (int i = 0; i < kSize; ++i) {
    int32_t bits;
    std::memcpy(&bits, &fraction[i], sizeof bits);
    bits += power[i] * (1 << 23);
    float result;
    std::memcpy(&result, &bits, sizeof result);
    value[i] = value[i] < -126.0f ? 0.0f : result;
  }
  return VecOf<float>::loadu(value);
}
#endif

inline VecOf<double> exp2_lanes(const VecOf<double>& x) {
  double value[VecOf<double>::size()];
  x.store(value);
  for (double& lane : value) lane = ::exp2(lane);
  return VecOf<double>::loadu(value);
}

// log2 of normal positive numbers, NaN for NaN; of others an arbitrary number.
inline VecOf<double> log2_lanes(const VecOf<double>& x) {
  double value[VecOf<double>::size()];
  x.store(value);
  for (double& lane : value) lane = ::log2(lane);
  return VecOf<double>::loadu(value);
}

// x = 2^n m with m in [sqrt(1/2), sqrt(2)); ln m = 2 atanh(s), s = (m - 1) / (m + 1), whose series
// ends within 1e-9.
inline VecOf<float> log2_lanes(const VecOf<float>& x) {
  constexpr int kSize = VecOf<float>::size();
  float mantissa[kSize];
  float power[kSize];
  x.store(mantissa);
  for (int i = 0; i < kSize; ++i) {
    int32_t bits;
    std::memcpy(&bits, &mantissa[i], sizeof bits);
    const int32_t n = (bits - 0x3f3504f3) >> 23;  // sqrt(1/2)
    bits -= n * (1 << 23);
    std::memcpy(&mantissa[i], &bits, sizeof bits);
    power[i] = static_cast<float>(n);
  }
  using Vec = VecOf<float>;
  const Vec m = Vec::loadu(mantissa);
  const Vec s = (m - Vec(1.0f)) / (m + Vec(1.0f));
  const Vec s2 = s * s;
  Vec p = Vec(2.0f / 9);
  p = at::vec::fmadd(p, s2, Vec(2.0f / 7));
  p = at::vec::fmadd(p, s2, Vec(2.0f / 5));
  p = at::vec::fmadd(p, s2, Vec(2.0f / 3));
  p = at::vec::fmadd(p, s2, Vec(2.0f));
  return at::vec::fmadd(p * s, Vec(1.44269504f), Vec::loadu(power)) + x * Vec(0.0f);
}

// dst[c][r] = src[r][c] for a square block.
template <typename T>
constexpr int kTransposeBlock = 1;

template <typename T>
inline void transpose_block(const T* src, int64_t, T* dst, int64_t) {
  *dst = *src;
}

#if defined(__AVX512F__)
template <>
constexpr int kTransposeBlock<float> = 16;

template <>
inline void transpose_block(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
  __m512 a[16];
  __m512 b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(src + i * ld_src);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // a[4i + c]: column c of rows 4i..4i+3, in each quarter
    a[4 * i] = _mm512_shuffle_ps(b[4 * i], b[4 * i + 2], 0x44);
    a[4 * i + 1] = _mm512_shuffle_ps(b[4 * i], b[4 * i + 2], 0xee);
    a[4 * i + 2] = _mm512_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0x44);
    a[4 * i + 3] = _mm512_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 low01 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88);   // quarters 0, 2
    const __m512 high01 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);  // quarters 1, 3
    const __m512 low23 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
    const __m512 high23 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_ps(dst + c * ld_dst, _mm512_shuffle_f32x4(low01, low23, 0x88));
    _mm512_storeu_ps(dst + (4 + c) * ld_dst, _mm512_shuffle_f32x4(high01, high23, 0x88));
    _mm512_storeu_ps(dst + (8 + c) * ld_dst, _mm512_shuffle_f32x4(low01, low23, 0xdd));
    _mm512_storeu_ps(dst + (12 + c) * ld_dst, _mm512_shuffle_f32x4(high01, high23, 0xdd));
  }
}
#elif defined(__AVX2__)
template <>
constexpr int kTransposeBlock<float> = 8;

template <>
inline void transpose_block(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
  __m256 a[8];
  __m256 b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(src + i * ld_src);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    a[4 * i] = _mm256_shuffle_ps(b[4 * i], b[4 * i + 2], 0x44);
    a[4 * i + 1] = _mm256_shuffle_ps(b[4 * i], b[4 * i + 2], 0xee);
    a[4 * i + 2] = _mm256_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0x44);
    a[4 * i + 3] = _mm256_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    _mm256_storeu_ps(dst + c * ld_dst, _mm256_permute2f128_ps(a[c], a[4 + c], 0x20));
    _mm256_storeu_ps(dst + (4 + c) * ld_dst, _mm256_permute2f128_ps(a[c], a[4 + c], 0x31));
  }
}
#endif

// dst[c][r] = src[r][c]; rows and columns are multiples of 16.
template <typename T>
inline void transpose_tile(const T* src, int64_t ld_src, int64_t rows, int64_t columns, T* dst,
                           int64_t ld_dst) {
  constexpr int kBlock = kTransposeBlock<T>;
  for (int64_t r = 0; r < rows; r += kBlock) {
    for (int64_t c = 0; c < columns; c += kBlock) {
      transpose_block(src + r * ld_src + c, ld_src, dst + c * ld_dst + r, ld_dst);
    }
  }
}

// The sums of as many rows as a vector has lanes, as a vector.
template <typename T>
inline VecOf<T> sum_rows(const VecOf<T>* rows) {
  constexpr int kSize = VecOf<T>::size();
  T x[kSize * kSize];
  T columns[kSize * kSize];
  for (int i = 0; i < kSize; ++i) rows[i].store(x + i * kSize);
  transpose_tile(x, kSize, kSize, kSize, columns, kSize);
  VecOf<T> sum = VecOf<T>::loadu(columns);
  for (int i = 1; i < kSize; ++i) sum = sum + VecOf<T>::loadu(columns + i * kSize);
  return sum;
}

#if defined(__AVX512F__)
// Each step adds halves of two vectors: 45 instructions where a transposition takes twice as many.
template <>
inline VecOf<float> sum_rows(const VecOf<float>* rows) {
  __m512 a[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = rows[i];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {  // rows 2i, 2i + 1 in turn
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]),
                         _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // rows 4i to 4i + 3 in each quarter
    a[i] = _mm512_add_ps(_mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44),
                         _mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {  // two quarters of each
    a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(a[2 * i], a[2 * i + 1], 0xdd));
  }
  return _mm512_add_ps(_mm512_shuffle_f32x4(a[0], a[1], 0x88),
                       _mm512_shuffle_f32x4(a[0], a[1], 0xdd));
}
#endif

// One number of a vector's lanes, in halves.
template <typename T, typename Fn>
inline T fold_lanes(const VecOf<T>& x, const Fn& fn) {
  T value[VecOf<T>::size()];
  x.store(value);
#pragma GCC unroll 4
  for (int half = VecOf<T>::size() / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) value[i] = fn(value[i], value[i + half]);
  }
  return value[0];
}

template <typename T>
inline T sum_of_lanes(const VecOf<T>& x) {
  return fold_lanes<T>(x, [](T a, T b) { return a + b; });
}

template <typename T>
inline T largest_lane(const VecOf<T>& x) {
  return fold_lanes<T>(x, [](T a, T b) { return a > b ? a : b; });
}

template <typename T>
inline T exp2_lane(T x) {
  T value[VecOf<T>::size()];
  exp2_lanes(VecOf<T>(x)).store(value);
  return value[0];
}

}  // namespace
}  // namespace winnow::CPU_CAPABILITY
