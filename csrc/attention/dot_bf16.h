// Products of bfloat16 through vdpbf16ps, which adds two terms per 32-bit lane: operands are pairs
// of numbers that follow each other along the sum. Sums are float. The only intrinsics of this
// family beyond vector_math.h.
#pragma once

#ifdef __AVX512BF16__

#include <immintrin.h>

#include <cstring>

#include "attention/operands.h"

namespace winnow::CPU_CAPABILITY {
namespace {

struct Bf16Pair {
  c10::BFloat16 x[2];
};

// Sixteen pairs (low, high) of two vectors of floats.
inline __m512i pair_up(const VecOf<float>& low, const VecOf<float>& high) {
  alignas(64) static constexpr int16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                     21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                     11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), (__m512i)both);
}

struct DotBf16 {
  using Acc = float;
  using Operand = Bf16Pair;
  static constexpr int kDepth = 2;
  using Vec = VecOf<float>;
  static __m512i broadcast(const Operand* a) {
    int32_t bits;
    std::memcpy(&bits, a, sizeof bits);
    return _mm512_set1_epi32(bits);
  }
  static __m512i load(const Operand* b) { return _mm512_loadu_si512(b); }
  static Vec add(__m512i a, __m512i b, const Vec& c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
  static void store(const Vec* terms, Operand* b) {
    _mm512_storeu_si512(b, pair_up(terms[0], terms[1]));
  }
  static Operand* weights(float*, Operand* buffer) { return buffer; }
  static void store_run(const Vec& terms, Operand* a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(a), (__m256i)_mm512_cvtneps_pbh(terms));
  }
};

inline __mmask32 first_shorts(int64_t count) {
  return count >= 32 ? 0xffffffffu : (1u << count) - 1;
}

// Pairs of one row and the next, or zeros: dst[d] = (a[d], b[d]).
inline void interleave(const c10::BFloat16* a, const c10::BFloat16* b, int64_t dim, Bf16Pair* dst) {
  alignas(64) static constexpr int16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                   37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                   11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  for (int64_t d = 0; d < dim; d += 32) {
    const __mmask32 mask = first_shorts(dim - d);
    const __m512i x = _mm512_maskz_loadu_epi16(mask, a + d);
    const __m512i y = b ? _mm512_maskz_loadu_epi16(mask, b + d) : _mm512_setzero_si512();
    _mm512_storeu_si512(dst + d, _mm512_permutex2var_epi16(x, low, y));
    _mm512_storeu_si512(dst + d + 16, _mm512_permutex2var_epi16(x, high, y));
  }
}

// One row out of a tile, as store_row of element_rows.h but in one instruction per vector, which
// makes zeros of subnormal numbers.
inline void store_row(const float* src, int64_t dim, c10::BFloat16* dst) {
  for (int64_t d = 0; d < dim; d += 16) {
    const __m256i x = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(src + d));
    _mm256_mask_storeu_epi16(dst + d, static_cast<__mmask16>(first_shorts(dim - d)), x);
  }
}

template <>
struct Pack<c10::BFloat16, DotBf16> {
  using T = c10::BFloat16;

  // Pairs of a row, and numbers of an interleaved pair of rows.
  static constexpr int64_t leading(int64_t dim) { return (dim + 31) / 32 * 16; }
  static constexpr int64_t leading_columns(int64_t dim) { return (dim + 31) / 32 * 32; }

  static OperandTile<Bf16Pair> rows(const T* src, int64_t stride, int64_t count, int64_t dim,
                                    Bf16Pair* buffer) {
    if (dim % 32 == 0 && stride % 2 == 0) {
      return {reinterpret_cast<const Bf16Pair*>(src), stride / 2};
    }
    const int64_t ld = leading(dim);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t d = 0; d < dim; d += 32) {
        _mm512_storeu_si512(buffer + r * ld + d / 2,
                            _mm512_maskz_loadu_epi16(first_shorts(dim - d), src + r * stride + d));
      }
    }
    return {buffer, ld};
  }

  // (row pair, dim); an odd last row is paired with zeros.
  static OperandTile<Bf16Pair> columns(const T* src, int64_t stride, int64_t count, int64_t dim,
                                       Bf16Pair* buffer) {
    const int64_t ld = leading_columns(dim);
    for (int64_t r = 0; r < count; r += 2) {
      const T* next = r + 1 < count ? src + (r + 1) * stride : nullptr;
      interleave(src + r * stride, next, dim, buffer + r / 2 * ld);
    }
    return {buffer, ld};
  }

  static void lanes(const T* src, int64_t stride, int64_t count, int64_t dim, Bf16Pair* buffer,
                    Bf16Pair* result) {
    const OperandTile<Bf16Pair> tile = rows(src, stride, count, dim, buffer);
    auto* space = reinterpret_cast<float*>(buffer);
    transpose_lanes(reinterpret_cast<const float*>(tile.data), tile.ld, count, leading(dim), space,
                    reinterpret_cast<float*>(result));
  }
};

}  // namespace
}  // namespace winnow::CPU_CAPABILITY

#endif  // __AVX512BF16__
