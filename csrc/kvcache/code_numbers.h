// Loads of codes as sixteen floats, beside those of lanes.h: the same on every instruction set.
// Included by *_simd.cc only.
#pragma once

#include "common/lanes.h"
#include "kvcache/codes.h"

namespace winnow {
namespace {

// The first n <= 16 bytes as integers, the others 0.
WINNOW_LANES i32x16 load_bytes(const void* p, int64_t n) {
  uint8_t bytes[kLanes] = {};
  std::memcpy(bytes, p, static_cast<size_t>(n));
  int32_t wide[kLanes];
  for (int i = 0; i < kLanes; ++i) wide[i] = bytes[i];
  i32x16 v;
  std::memcpy(v.part, wide, sizeof v.part);
  return v;
}

WINNOW_LANES f32x16 load_lanes(const int8_t* p, int64_t n, float fill) {
  const f32x16 numbers = to_float((load_bytes(p, n) << 24) >> 24);
  return select(lane_index() < static_cast<int32_t>(n), numbers, f32x16(fill));
}

WINNOW_LANES f32x16 load_lanes(const Float8* p, int64_t n, float fill) {
  const i32x16 byte = load_bytes(p, n);
  const i32x16 magnitude = byte & 0x7f;
  const i32x16 normal = (magnitude << 20) + (120 << 23);
  const i32x16 subnormal = as_bits(to_float(magnitude) * f32x16(0x1p-9f));
  const i32x16 finite = select(magnitude < 8, subnormal, normal);
  const i32x16 number = select(magnitude == 0x7f, i32x16(0x7fc00000), finite);
  return select(lane_index() < static_cast<int32_t>(n), as_float(number | ((byte & 0x80) << 24)),
                f32x16(fill));
}

WINNOW_LANES f32x16 load_lanes(const int8_t* p) {
  return load_lanes(p, kLanes, 0.0f);
}
WINNOW_LANES f32x16 load_lanes(const Float8* p) {
  return load_lanes(p, kLanes, 0.0f);
}

}  // namespace
}  // namespace winnow
