// What quantised pages hold: a code of one byte per number, int8 or float8 e4m3, and a float scale
// per block and key head; a number is code * scale. The scale is the smallest point of a grid at
// which the block's largest finite magnitude has a code, so it depends on that magnitude alone, not
// on the order in which tokens came. The grid has four points per octave for int8, where a finer
// one would have to be climbed in more steps that each round the codes anew, and one for e4m3,
// whose codes lose nothing when their scale doubles (until they become subnormal).
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#define WINNOW_CODES __host__ __device__ inline
#else
#define WINNOW_CODES [[maybe_unused]] inline
#endif

namespace winnow {

enum class CodeType : int { kInt8, kFloat8 };

// float8 e4m3fn: 4 bits of exponent, 3 of mantissa, no infinities, NaN is 0x7f and 0xff.
struct Float8 {
  uint8_t bits;
};

namespace {

template <typename T>
constexpr bool kCoded = std::is_same_v<T, int8_t> || std::is_same_v<T, Float8>;

constexpr float kLargestFloat = 0x1.fffffep127f;

template <typename Code>
WINNOW_CODES CodeType code_type_of() {
  static_assert(kCoded<Code>);
  return std::is_same_v<Code, int8_t> ? CodeType::kInt8 : CodeType::kFloat8;
}

// fn receives a code.
template <typename Fn>
void dispatch_codes(CodeType codes, const Fn& fn) {
  if (codes == CodeType::kInt8) {
    fn(int8_t{});
  } else {
    fn(Float8{});
  }
}

WINNOW_CODES float largest_code(CodeType type) {
  return type == CodeType::kInt8 ? 127.0f : 448.0f;
}

// For the largest of the magnitudes to be stored; 0 for 0, and never so small that its inverse
// overflows.
WINNOW_CODES float scale_for(CodeType type, float largest) {
  if (!(largest > 0.0f)) return 0.0f;
  const float least = largest / largest_code(type);
  uint32_t bits;
  memcpy(&bits, &least, sizeof bits);
  uint32_t exponent = bits & 0x7f800000u;
  uint32_t mantissa = bits & 0x007fffffu;
  if (exponent == 0) {
    exponent = 0x00800000u;
    mantissa = 0;
  }
  if (type == CodeType::kInt8) {  // 2^(1/4), 2^(1/2), 2^(3/4)
    mantissa = mantissa == 0           ? 0u
               : mantissa <= 0x1837f0u ? 0x1837f0u
               : mantissa <= 0x3504f3u ? 0x3504f3u
               : mantissa <= 0x5744fdu ? 0x5744fdu
                                       : 0x800000u;
  } else if (mantissa != 0) {
    mantissa = 0x800000u;
  }
  bits = exponent + mantissa;
  float scale;
  memcpy(&scale, &bits, sizeof scale);
  return scale;
}

WINNOW_CODES float inverse_of(float scale) {
  return scale > 0.0f ? 1.0f / scale : 0.0f;
}

WINNOW_CODES float number_of(int8_t code) {
  return static_cast<float>(code);
}

WINNOW_CODES float number_of(Float8 code) {
  const uint32_t magnitude = code.bits & 0x7fu;
  uint32_t bits = magnitude << 20;
  float number;
  memcpy(&number, &bits, sizeof number);
  number *= 0x1p120f;  // the exponent's other bias, subnormal codes included
  memcpy(&bits, &number, sizeof bits);
  if (magnitude == 0x7fu) bits = 0x7fc00000u;
  bits |= (code.bits & 0x80u) << 24;
  memcpy(&number, &bits, sizeof number);
  return number;
}

// The nearest code of x * factor, ties to even. What is too large gets the largest code, infinities
// included; a NaN stays one, and is 0 in int8, which has none.
WINNOW_CODES float bounded(float x, float factor, float most) {
  x = x > kLargestFloat ? kLargestFloat : x < -kLargestFloat ? -kLargestFloat : x;
  x *= factor;
  return x > most ? most : x < -most ? -most : x;
}

WINNOW_CODES void encode(float x, float factor, int8_t* code) {
  const float y = bounded(x, factor, 127.0f) + 12582912.0f;  // 1.5 * 2^23 rounds to an integer
  *code = x == x ? static_cast<int8_t>(y - 12582912.0f) : int8_t{0};
}

WINNOW_CODES void encode(float x, float factor, Float8* code) {
  const float y = bounded(x, factor, 448.0f);
  uint32_t bits;
  memcpy(&bits, &y, sizeof bits);
  const uint32_t sign = (bits >> 24) & 0x80u;
  bits &= 0x7fffffffu;
  float magnitude;
  memcpy(&magnitude, &bits, sizeof magnitude);
  uint32_t rounded = ((bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20) - (120u << 3);
  if (magnitude < 0x1p-6f) {  // subnormal: it counts 2^-9, the last place of floats from 2^14 on
    magnitude += 0x1p14f;
    memcpy(&bits, &magnitude, sizeof bits);
    rounded = bits - 0x46800000u;
  }
  code->bits = static_cast<uint8_t>(x == x ? rounded | sign : 0x7fu);
}

}  // namespace
}  // namespace winnow
