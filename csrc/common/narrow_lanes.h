// From sixteen floats to an element type, to nearest even; a NaN stays a quiet NaN.
#pragma once

#include "common/lanes.h"

namespace winnow {
namespace {

inline i32x16 nearest_bf16(f32x16 x) {
  const i32x16 bits = as_bits(x);
  const i32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return select(x != x, i32x16(0x7fc0), rounded);
}

// To nearest even: normal halves by rounding the mantissa, subnormal ones by adding a number whose
// last place is the smallest half.
inline i32x16 nearest_half(f32x16 x) {
  const i32x16 bits = as_bits(x);
  const i32x16 magnitude = bits & 0x7fffffff;
  const i32x16 normal = (magnitude + (0xfff - (112 << 23)) + ((magnitude >> 13) & 1)) >> 13;
  const i32x16 small = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
  const i32x16 infinite = select(x != x, i32x16(0x7e00), i32x16(0x7c00));
  const i32x16 result = select(magnitude > i32x16(0x477fffff), infinite,
                               select(magnitude < i32x16(0x38800000), small, normal));
  return result | ((bits >> 16) & 0x8000);
}

inline void store_shorts(void* p, i32x16 v, int64_t n) {
  uint16_t raw[kLanes];
  int32_t wide[kLanes];
  std::memcpy(wide, &v, sizeof wide);
  for (int i = 0; i < kLanes; ++i) raw[i] = static_cast<uint16_t>(wide[i]);
  std::memcpy(p, raw, static_cast<size_t>(n) * sizeof(uint16_t));
}

inline void store_first(float* p, f32x16 v, int64_t n) {
  std::memcpy(p, &v, static_cast<size_t>(n) * sizeof(float));
}
inline void store_first(c10::BFloat16* p, f32x16 v, int64_t n) {
  store_shorts(p, nearest_bf16(v), n);
}
inline void store_first(c10::Half* p, f32x16 v, int64_t n) {
  store_shorts(p, nearest_half(v), n);
}

}  // namespace
}  // namespace winnow
