// Rows of any element type in and out of the tiles, which hold float (or double).
#pragma once

#include "common/lanes.h"

namespace winnow::CPU_CAPABILITY {
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

// One row out of a tile, rounded to the element type.
template <typename T>
inline void store_row(const float* src, int64_t dim, T* dst) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store_first(dst + d, load_lanes(src + d), kLanes);
  if (d < dim) store_first(dst + d, load_lanes(src + d, dim - d, 0.0f), dim - d);
}

inline void store_row(const double* src, int64_t dim, double* dst) {
  std::memcpy(dst, src, static_cast<size_t>(dim) * sizeof(double));
}

// `rows` rows, `stride` elements apart, to a tile of leading dimension `ld` (a multiple of 16),
// with zeros from dim to ld. Returns whether every number is finite.
template <typename T>
inline bool load_rows(const T* src, int64_t stride, int64_t rows, int64_t dim, float* dst,
                      int64_t ld) {
  f32x16 probe = 0.0f;  // NaN once an infinity or a NaN was multiplied by zero
  const int64_t whole = dim / kLanes * kLanes;
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = src + r * stride;
    float* out = dst + r * ld;
    for (int64_t d = 0; d < whole; d += kLanes) {
      const f32x16 x = load_lanes(row + d);
      probe = probe + x * 0.0f;
      store_lanes(out + d, x);
    }
    if (whole < dim) {
      const f32x16 x = load_lanes(row + whole, dim - whole, 0.0f);
      probe = probe + x * 0.0f;
      store_lanes(out + whole, x);
    }
  }
  return !any(probe != probe);
}

inline bool load_rows(const double* src, int64_t stride, int64_t rows, int64_t dim, double* dst,
                      int64_t ld) {
  double probe = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < dim; ++d) {
      dst[r * ld + d] = src[r * stride + d];
      probe += dst[r * ld + d] * 0.0;
    }
    for (int64_t d = dim; d < ld; ++d) dst[r * ld + d] = 0.0;
  }
  return probe == probe;
}

}  // namespace
}  // namespace winnow::CPU_CAPABILITY
