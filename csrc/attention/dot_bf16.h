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
};

inline __mmask32 first_shorts(int64_t count) {
  return count >= 32 ? 0xffffffffu : (1u << count) - 1;
}

// Pairs of one row and the next: dst[d] = (a[d], b[d]). Zeros for what is not finite, which clears
// `finite`.
inline void interleave(const c10::BFloat16* a, const c10::BFloat16* b, int64_t dim, Bf16Pair* dst,
                       bool* finite) {
  alignas(64) static constexpr int16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                   37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                   11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  for (int64_t d = 0; d < dim; d += 32) {
    const __mmask32 mask = first_shorts(dim - d);
    __m512i x = _mm512_maskz_loadu_epi16(mask, a + d);
    __m512i y = b ? _mm512_maskz_loadu_epi16(mask, b + d) : _mm512_setzero_si512();
    const __mmask32 x_bad = _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
    const __mmask32 y_bad = _mm512_cmpeq_epi16_mask(_mm512_and_si512(y, exponent), exponent);
    if (x_bad | y_bad) {
      *finite = false;
      x = _mm512_maskz_mov_epi16(~x_bad, x);
      y = _mm512_maskz_mov_epi16(~y_bad, y);
    }
    _mm512_storeu_si512(dst + d, _mm512_permutex2var_epi16(x, low, y));
    _mm512_storeu_si512(dst + d + 16, _mm512_permutex2var_epi16(x, high, y));
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
    const int64_t ld = leading(dim);
    copy_rows(src, stride, count, dim, buffer);
    if (count % 2 == 1) std::memset(buffer + count * ld, 0, static_cast<size_t>(ld) * 4);
    return {buffer, ld};
  }

  // (row pair, dim); an odd last row is paired with zeros.
  static OperandTile<Bf16Pair> columns(const T* src, int64_t stride, int64_t count, int64_t dim,
                                       Bf16Pair* buffer, bool* finite) {
    const int64_t ld = leading_columns(dim);
    *finite = true;
    for (int64_t r = 0; r < count; r += 2) {
      const T* next = r + 1 < count ? src + (r + 1) * stride : nullptr;
      interleave(src + r * stride, next, dim, buffer + r / 2 * ld, finite);
    }
    return {buffer, ld};
  }

  static void lanes(const T* src, int64_t stride, int64_t count, int64_t dim, Bf16Pair* rows,
                    Bf16Pair* result) {
    auto* out = reinterpret_cast<float*>(result);
    if (count == kTile && dim % 32 == 0 && stride % 2 == 0) {
      transpose_tile(reinterpret_cast<const float*>(src), stride / 2, kTile, dim / 2, out, kTile);
      return;
    }
    const int64_t ld = leading(dim);
    copy_rows(src, stride, count, dim, rows);
    std::memset(rows + count * ld, 0, static_cast<size_t>((kTile - count) * ld) * 4);
    transpose_tile(reinterpret_cast<const float*>(rows), ld, kTile, ld, out, kTile);
  }

  static Bf16Pair* weights(float*, Bf16Pair* buffer) { return buffer; }
  static float weight(const Bf16Pair* weights, int64_t ld, int key, int lane) {
    uint16_t bits;
    std::memcpy(&bits, &weights[key / 2 * ld + lane].x[key % 2], sizeof bits);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }

 private:
  static void copy_rows(const T* src, int64_t stride, int64_t count, int64_t dim, Bf16Pair* dst) {
    const int64_t ld = leading(dim);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t d = 0; d < dim; d += 32) {
        _mm512_storeu_si512(dst + r * ld + d / 2,
                            _mm512_maskz_loadu_epi16(first_shorts(dim - d), src + r * stride + d));
      }
    }
  }
};

}  // namespace
}  // namespace winnow::CPU_CAPABILITY

#endif  // __AVX512BF16__
