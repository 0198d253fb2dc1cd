// Rows of any element type in and out of the tiles, which hold float (or double).
#pragma once

#include "common/narrow_lanes.h"

namespace winnow::CPU_CAPABILITY {
namespace {

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
