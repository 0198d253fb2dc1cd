// Sixteen float lanes whose results are bitwise equal on every instruction set: one AVX-512
// register, two of AVX2, four of SSE or NEON, through the compiler's vector types; fused
// multiply-adds where fma_lanes says so and nowhere else, reductions in one fixed order. For what
// must not depend on the machine: draws, prefix sums, decisions. Loops that may differ in the last
// bit use at::vec.
//
// Included by *_simd.cc only; internal linkage, because each unit has flags of its own. c10's
// scalar conversions are avoided: they are inline functions that the linker may merge across
// instruction sets.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __x86_64__
#include <immintrin.h>
#endif

// GCC leaves exp_lanes and its like out of line for AVX2 and passes sixteen lanes through memory.
#define WINNOW_LANES [[maybe_unused]] inline __attribute__((always_inline))

namespace winnow {
namespace {

constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kParts = 1;
#elif defined(__AVX2__)
constexpr int kParts = 2;
#else
constexpr int kParts = 4;
#endif
// A vector wider than a register would be lowered to scalars in comparisons, hence the parts.
typedef float FloatPart __attribute__((vector_size(64 / kParts)));
typedef int32_t IntPart __attribute__((vector_size(64 / kParts)));
typedef uint32_t BitsPart __attribute__((vector_size(64 / kParts)));
typedef uint16_t ShortPart __attribute__((vector_size(32 / kParts)));
// Memory and registers exchange whole registers, here and in the copies below: GCC copies a 64-byte
// structure in 16-byte pieces, and a 32-byte load of two such pieces waits until both stores have
// reached the cache (AVX2 ran at half the speed of SSE). Name these types where they are used:
// deduction (auto) drops their alignment.
typedef float LooseFloats __attribute__((vector_size(64 / kParts), aligned(4), may_alias));
typedef int32_t LooseInts __attribute__((vector_size(64 / kParts), aligned(4), may_alias));
typedef uint16_t LooseShorts __attribute__((vector_size(32 / kParts), aligned(2), may_alias));
typedef float LooseQuad __attribute__((vector_size(16), aligned(4), may_alias));
typedef float Quad __attribute__((vector_size(16)));

// Integers, bit patterns and masks (all ones or zero). Shifts are arithmetic.
struct i32x16 {
  IntPart part[kParts];
  i32x16() = default;
  i32x16(const i32x16& x) {
    for (int p = 0; p < kParts; ++p) part[p] = x.part[p];
  }
  i32x16& operator=(const i32x16& x) {  // NOLINT(bugprone-unhandled-self-assignment): no harm
    for (int p = 0; p < kParts; ++p) part[p] = x.part[p];
    return *this;
  }
  i32x16(int32_t x) {  // NOLINT(misc-explicit-constructor): a number is a vector of it
    for (int p = 0; p < kParts; ++p) part[p] = IntPart{} + x;
  }
};

struct f32x16 {
  FloatPart part[kParts];
  f32x16() = default;
  f32x16(const f32x16& x) {
    for (int p = 0; p < kParts; ++p) part[p] = x.part[p];
  }
  f32x16& operator=(const f32x16& x) {  // NOLINT(bugprone-unhandled-self-assignment): no harm
    for (int p = 0; p < kParts; ++p) part[p] = x.part[p];
    return *this;
  }
  f32x16(float x) {  // NOLINT(misc-explicit-constructor): a number is a vector of it
    for (int p = 0; p < kParts; ++p) part[p] = FloatPart{} + x;
  }
};

#define WINNOW_LANES_OPERATOR(op, Result, Operand, Part)  \
  WINNOW_LANES Result operator op(Operand a, Operand b) { \
    Result r;                                             \
    for (int p = 0; p < kParts; ++p) {                    \
      r.part[p] = (Part)(a.part[p] op b.part[p]);         \
    }                                                     \
    return r;                                             \
  }
WINNOW_LANES_OPERATOR(+, f32x16, f32x16, FloatPart)
WINNOW_LANES_OPERATOR(-, f32x16, f32x16, FloatPart)
WINNOW_LANES_OPERATOR(*, f32x16, f32x16, FloatPart)
WINNOW_LANES_OPERATOR(/, f32x16, f32x16, FloatPart)
WINNOW_LANES_OPERATOR(<, i32x16, f32x16, IntPart)
WINNOW_LANES_OPERATOR(>, i32x16, f32x16, IntPart)
WINNOW_LANES_OPERATOR(<=, i32x16, f32x16, IntPart)
WINNOW_LANES_OPERATOR(>=, i32x16, f32x16, IntPart)
WINNOW_LANES_OPERATOR(==, i32x16, f32x16, IntPart)
WINNOW_LANES_OPERATOR(!=, i32x16, f32x16, IntPart)
WINNOW_LANES_OPERATOR(+, i32x16, i32x16, IntPart)
WINNOW_LANES_OPERATOR(-, i32x16, i32x16, IntPart)
WINNOW_LANES_OPERATOR(*, i32x16, i32x16, IntPart)
WINNOW_LANES_OPERATOR(&, i32x16, i32x16, IntPart)
WINNOW_LANES_OPERATOR(|, i32x16, i32x16, IntPart)
WINNOW_LANES_OPERATOR(^, i32x16, i32x16, IntPart)
WINNOW_LANES_OPERATOR(<, i32x16, i32x16, IntPart)
WINNOW_LANES_OPERATOR(>, i32x16, i32x16, IntPart)
WINNOW_LANES_OPERATOR(==, i32x16, i32x16, IntPart)
#undef WINNOW_LANES_OPERATOR

WINNOW_LANES i32x16 operator<<(i32x16 a, int count) {
  for (int p = 0; p < kParts; ++p) a.part[p] = (IntPart)((BitsPart)a.part[p] << count);
  return a;
}

WINNOW_LANES i32x16 operator>>(i32x16 a, int count) {
  for (int p = 0; p < kParts; ++p) a.part[p] = a.part[p] >> count;
  return a;
}

WINNOW_LANES f32x16 as_float(i32x16 a) {
  f32x16 r;
  for (int p = 0; p < kParts; ++p) r.part[p] = (FloatPart)a.part[p];
  return r;
}

WINNOW_LANES i32x16 as_bits(f32x16 a) {
  i32x16 r;
  for (int p = 0; p < kParts; ++p) r.part[p] = (IntPart)a.part[p];
  return r;
}

WINNOW_LANES f32x16 to_float(i32x16 a) {
  f32x16 r;
  for (int p = 0; p < kParts; ++p) r.part[p] = __builtin_convertvector(a.part[p], FloatPart);
  return r;
}

WINNOW_LANES f32x16 select(i32x16 mask, f32x16 yes, f32x16 no) {
  for (int p = 0; p < kParts; ++p) yes.part[p] = mask.part[p] ? yes.part[p] : no.part[p];
  return yes;
}

WINNOW_LANES i32x16 select(i32x16 mask, i32x16 yes, i32x16 no) {
  for (int p = 0; p < kParts; ++p) yes.part[p] = mask.part[p] ? yes.part[p] : no.part[p];
  return yes;
}

WINNOW_LANES bool any(i32x16 mask) {
  IntPart all = mask.part[0];
  for (int p = 1; p < kParts; ++p) all |= mask.part[p];
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)all, (__m512i)all) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)all, (__m256i)all);
#elif defined(__x86_64__)
  return _mm_movemask_epi8((__m128i)all) != 0;  // lanes are all ones or zero
#else
  return (all[0] | all[1] | all[2] | all[3]) != 0;
#endif
}

// a > b ? a : b and a < b ? a : b, so b where either is NaN: what x86 has an instruction for, which
// GCC does not always find.
WINNOW_LANES f32x16 max_lanes(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
  a.part[0] = _mm512_max_ps(a.part[0], b.part[0]);
  return a;
#elif defined(__AVX2__)
  for (int p = 0; p < kParts; ++p) a.part[p] = _mm256_max_ps(a.part[p], b.part[p]);
  return a;
#elif defined(__x86_64__)
  for (int p = 0; p < kParts; ++p) a.part[p] = _mm_max_ps(a.part[p], b.part[p]);
  return a;
#else
  return select(a > b, a, b);
#endif
}

WINNOW_LANES f32x16 min_lanes(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
  a.part[0] = _mm512_min_ps(a.part[0], b.part[0]);
  return a;
#elif defined(__AVX2__)
  for (int p = 0; p < kParts; ++p) a.part[p] = _mm256_min_ps(a.part[p], b.part[p]);
  return a;
#elif defined(__x86_64__)
  for (int p = 0; p < kParts; ++p) a.part[p] = _mm_min_ps(a.part[p], b.part[p]);
  return a;
#else
  return select(a < b, a, b);
#endif
}

#if defined(__x86_64__) && !defined(__FMA__)
// a * b + c rounded once, for machines without the instruction: the product is exact in double, the
// sum is rounded to odd (its last bit tells that something was cut off), and such a sum rounds to
// float as the exact one does. For results in the normal range.
WINNOW_LANES __m128d fused_to_odd(__m128d a, __m128d b, __m128d c) {
  const __m128d product = _mm_mul_pd(a, b);
  const __m128d sum = _mm_add_pd(product, c);
  const __m128d of_c = _mm_sub_pd(sum, product);
  const __m128d lost = _mm_add_pd(_mm_sub_pd(product, _mm_sub_pd(sum, of_c)), _mm_sub_pd(c, of_c));
  const __m128i bits = _mm_castpd_si128(sum);
  // Away from zero by one where what was lost has the sum's sign, else towards it; even sums only.
  const __m128i inexact = _mm_castpd_si128(_mm_cmpneq_pd(lost, _mm_setzero_pd()));
  const __m128i even = _mm_sub_epi64(_mm_and_si128(bits, _mm_set1_epi64x(1)), _mm_set1_epi64x(1));
  const __m128i differs = _mm_xor_si128(bits, _mm_castpd_si128(lost));
  const __m128i sign = _mm_shuffle_epi32(_mm_srai_epi32(differs, 31), 0xf5);
  const __m128i step = _mm_or_si128(sign, _mm_set1_epi64x(1));
  return _mm_castsi128_pd(_mm_add_epi64(bits, _mm_and_si128(step, _mm_and_si128(inexact, even))));
}

WINNOW_LANES __m128 fused(__m128 a, __m128 b, __m128 c) {
  const auto low = fused_to_odd(_mm_cvtps_pd(a), _mm_cvtps_pd(b), _mm_cvtps_pd(c));
  const auto high =
      fused_to_odd(_mm_cvtps_pd(_mm_movehl_ps(a, a)), _mm_cvtps_pd(_mm_movehl_ps(b, b)),
                   _mm_cvtps_pd(_mm_movehl_ps(c, c)));
  return _mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high));
}
#endif

// a * b + c with one rounding on every machine. One instruction where there is one, some forty
// where there is none (x86 before 2013): for loops whose speed depends on it.
WINNOW_LANES f32x16 fma_lanes(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
  c.part[0] = _mm512_fmadd_ps(a.part[0], b.part[0], c.part[0]);
#elif defined(__FMA__)
  for (int p = 0; p < kParts; ++p) c.part[p] = _mm256_fmadd_ps(a.part[p], b.part[p], c.part[p]);
#elif defined(__x86_64__)
  for (int p = 0; p < kParts; ++p) c.part[p] = fused(a.part[p], b.part[p], c.part[p]);
#else
  for (int p = 0; p < kParts; ++p) {
    for (int i = 0; i < kLanes / kParts; ++i) {
      c.part[p][i] = __builtin_fmaf(a.part[p][i], b.part[p][i], c.part[p][i]);
    }
  }
#endif
  return c;
}

WINNOW_LANES i32x16 lane_index() {
  static constexpr int32_t kIndex[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  i32x16 v;
  for (int p = 0; p < kParts; ++p) {
    v.part[p] = (IntPart) * reinterpret_cast<const LooseInts*>(kIndex + p * kLanes / kParts);
  }
  return v;
}

WINNOW_LANES f32x16 load_lanes(const float* p) {
  f32x16 v;
  for (int i = 0; i < kParts; ++i) {
    v.part[i] = (FloatPart) * reinterpret_cast<const LooseFloats*>(p + i * kLanes / kParts);
  }
  return v;
}

WINNOW_LANES i32x16 load_shorts(const void* p) {
  const auto* shorts = static_cast<const uint16_t*>(p);
  i32x16 v;
  for (int i = 0; i < kParts; ++i) {
    const LooseShorts* raw = reinterpret_cast<const LooseShorts*>(shorts + i * kLanes / kParts);
    v.part[i] = (IntPart) __builtin_convertvector((ShortPart)*raw, BitsPart);
  }
  return v;
}

WINNOW_LANES f32x16 load_lanes(const c10::BFloat16* p) {
  return as_float(load_shorts(p) << 16);
}

// Exact for every half, subnormal, infinite and NaN: a multiplication re-biases the exponent.
WINNOW_LANES f32x16 load_lanes(const c10::Half* p) {
  const i32x16 bits = load_shorts(p);
  const i32x16 magnitude = (bits & 0x7fff) << 13;
  const i32x16 finite = as_bits(as_float(magnitude) * 0x1p112f);
  const i32x16 special = magnitude + (224 << 23);
  return as_float(select(magnitude > ((0x7c00 << 13) - 1), special, finite) |
                  ((bits & 0x8000) << 16));
}

// The first n < 16 elements, the others `fill`.
template <typename T>
WINNOW_LANES f32x16 load_lanes(const T* p, int64_t n, float fill) {
  alignas(64) unsigned char raw[kLanes * sizeof(T)] = {};
  std::memcpy(raw, p, static_cast<size_t>(n) * sizeof(T));
  return select(lane_index() < static_cast<int32_t>(n), load_lanes(reinterpret_cast<const T*>(raw)),
                f32x16(fill));
}

WINNOW_LANES void store_lanes(float* p, f32x16 v) {
  for (int i = 0; i < kParts; ++i) {
    *reinterpret_cast<LooseFloats*>(p + i * kLanes / kParts) = (LooseFloats)v.part[i];
  }
}

// Lanes 4 q to 4 q + 3 of a vector that was stored.
WINNOW_LANES Quad quad(const float* x, int q) {
  return (Quad) * reinterpret_cast<const LooseQuad*>(x + 4 * q);
}

// Halves, quarters, ...: one order for every instruction set.
WINNOW_LANES float sum_lanes(f32x16 v) {
  alignas(64) float x[kLanes];
  store_lanes(x, v);
  const Quad y = (quad(x, 0) + quad(x, 2)) + (quad(x, 1) + quad(x, 3));
  return (y[0] + y[2]) + (y[1] + y[3]);
}

// The largest lane, NaN lanes aside; -infinity where all are NaN.
WINNOW_LANES float max_lane(f32x16 v) {
  alignas(64) float x[kLanes];
  store_lanes(x, v);
  Quad y = Quad{} - std::numeric_limits<float>::infinity();
  for (int q = 0; q < 4; ++q) y = quad(x, q) > y ? quad(x, q) : y;
  const float low = y[0] > y[1] ? y[0] : y[1];
  const float high = y[2] > y[3] ? y[2] : y[3];
  return low > high ? low : high;
}

// exp(x) within 2 ulp for -87.33 <= x <= 88.72, above that infinity, below it 0 (no subnormals),
// NaN for NaN. x = n ln 2 + r with |r| <= ln 2 / 2, then Cephes' polynomial of degree 6 in r.
WINNOW_LANES f32x16 exp_lanes(f32x16 x) {
  const f32x16 magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const f32x16 clamped = max_lanes(min_lanes(x, 89.0f), -87.34f);
  const f32x16 k = clamped * 1.44269504088896341f + magic;
  const f32x16 n = k - magic;
  const f32x16 r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  f32x16 p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  // Two factors of 2^(n/2): n = 128 would overflow one exponent field.
  const i32x16 whole = as_bits(k) - as_bits(magic);
  const i32x16 half = whole >> 1;
  const f32x16 y = p * as_float((half + 127) << 23) * as_float((whole - half + 127) << 23);
  return select(x != x, x, select(x < f32x16(-87.33f), f32x16(0.0f), y));
}

}  // namespace
}  // namespace winnow
