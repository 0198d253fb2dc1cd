// Loads of codes as a register of floats, beside those of tile_lanes.h. Included by *_simd.cc only.
#pragma once

#include "kvcache/codes.h"
#include "kvcache/tile_lanes.h"

namespace winnow {
namespace {

typedef int8_t CodePart __attribute__((vector_size(16 / kParts)));
typedef uint8_t ByteCodePart __attribute__((vector_size(16 / kParts)));

inline FloatPart load_part(const int8_t* p) {
#if defined(__AVX512F__)
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (FloatPart)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw));
#elif defined(__AVX2__)
  const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (FloatPart)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw));
#else
  CodePart raw;
  std::memcpy(&raw, p, sizeof raw);
  return __builtin_convertvector(__builtin_convertvector(raw, IntPart), FloatPart);
#endif
}

// As halves, whose exponent is worth 2^-8 of a code's, where the machine converts those, subnormal
// ones included. NaN is the only magnitude (0x7f) from which adding 1 carries into the next bit,
// and with that bit it is a NaN of halves.
inline FloatPart load_part(const Float8* p) {
#if defined(__AVX512F__)
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i w = _mm256_cvtepi8_epi16(raw);
  const __m256i shifted = _mm256_slli_epi16(w, 7);
  const __m256i carry = _mm256_add_epi16(shifted, _mm256_set1_epi16(0x80));
  const __m256i magnitude = _mm256_and_si256(shifted, _mm256_set1_epi16(0x3f80));
  const __m256i finite = _mm256_or_si256(magnitude, _mm256_and_si256(w, _mm256_set1_epi16(-32768)));
  const __m256i nan = _mm256_and_si256(_mm256_xor_si256(carry, shifted), _mm256_set1_epi16(0x4000));
  return (FloatPart)(_mm512_cvtph_ps(_mm256_or_si256(finite, nan)) * _mm512_set1_ps(256.0f));
#elif defined(__F16C__)
  const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m128i w = _mm_cvtepi8_epi16(raw);
  const __m128i shifted = _mm_slli_epi16(w, 7);
  const __m128i carry = _mm_add_epi16(shifted, _mm_set1_epi16(0x80));
  const __m128i magnitude = _mm_and_si128(shifted, _mm_set1_epi16(0x3f80));
  const __m128i finite = _mm_or_si128(magnitude, _mm_and_si128(w, _mm_set1_epi16(-32768)));
  const __m128i nan = _mm_and_si128(_mm_xor_si128(carry, shifted), _mm_set1_epi16(0x4000));
  return (FloatPart)(_mm256_cvtph_ps(_mm_or_si128(finite, nan)) * _mm256_set1_ps(256.0f));
#else
  ByteCodePart raw;
  std::memcpy(&raw, p, sizeof raw);
  const IntPart byte = __builtin_convertvector(raw, IntPart);
  const IntPart magnitude = byte & 0x7f;
  const IntPart normal = (magnitude << 20) + (120 << 23);
  const IntPart small = (IntPart)(__builtin_convertvector(magnitude, FloatPart) * 0x1p-9f);
  const IntPart finite = magnitude < 8 ? small : normal;
  const IntPart chosen = magnitude == 0x7f ? IntPart{} + 0x7fc00000 : finite;
  return (FloatPart)(chosen | ((byte & 0x80) << 24));
#endif
}

// The first n < kWide codes, the others 0.
template <typename Code>
inline FloatPart load_codes(const Code* p, int64_t n) {
  alignas(16) unsigned char raw[kWide] = {};
  std::memcpy(raw, p, static_cast<size_t>(n));
  return load_part(reinterpret_cast<const Code*>(raw));
}
inline FloatPart load_part(const int8_t* p, int64_t n) {
  return load_codes(p, n);
}
inline FloatPart load_part(const Float8* p, int64_t n) {
  return load_codes(p, n);
}

}  // namespace
}  // namespace winnow
