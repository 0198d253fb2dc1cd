// Queries, keys and values as the operands of tile_product.h, for one way of multiplying: in place
// where they have the operands' type and fill whole vectors, else packed.
#pragma once

#include <type_traits>

#include "attention/element_rows.h"
#include "attention/problem.h"
#include "attention/tile_product.h"

namespace winnow::CPU_CAPABILITY {
namespace {

template <typename Operand>
struct OperandTile {
  const Operand* data;
  int64_t ld;
};

template <typename Acc>
inline void zero(Acc* dst, int64_t count) {
  for (int64_t i = 0; i < count; ++i) dst[i] = Acc(0);
}

// (row, column) to (column, lane) for one vector of lanes, kTile lanes apart; lanes from count on
// are zero. `columns` is a multiple of 16; the buffer holds as many rows as a vector has lanes.
template <typename T>
inline void transpose_lanes(const T* rows, int64_t ld, int64_t count, int64_t columns, T* buffer,
                            T* result) {
  constexpr int kSize = VecOf<T>::size();
  if (count < kSize) {
    for (int64_t r = 0; r < kSize; ++r) {
      for (int64_t c = 0; c < columns; ++c) {
        buffer[r * columns + c] = r < count ? rows[r * ld + c] : T(0);
      }
    }
    rows = buffer;
    ld = columns;
  }
  transpose_tile(rows, ld, kSize, columns, result, kTile);
}

template <typename T, class Math>
struct Pack;

// One number per operand: numbers of the accumulator's type.
template <typename T, typename Acc>
struct Pack<T, Multiply<Acc>> {
  static constexpr int64_t leading(int64_t dim) { return padded_dim(dim); }

  // (row, dim), for products over dim.
  static OperandTile<Acc> rows(const T* src, int64_t stride, int64_t count, int64_t dim,
                               Acc* buffer) {
    if constexpr (std::is_same_v<T, Acc>) {
      if (leading(dim) == dim) return {src, stride};
    }
    load_rows(src, stride, count, dim, buffer, leading(dim));
    return {buffer, leading(dim)};
  }

  // (row, dim), for products over rows.
  static OperandTile<Acc> columns(const T* src, int64_t stride, int64_t count, int64_t dim,
                                  Acc* buffer) {
    return rows(src, stride, count, dim, buffer);
  }

  // (dim, lane) out of rows, one vector of lanes; lanes from count on are zero.
  static void lanes(const T* src, int64_t stride, int64_t count, int64_t dim, Acc* buffer,
                    Acc* result) {
    const OperandTile<Acc> tile = rows(src, stride, count, dim, buffer);
    transpose_lanes(tile.data, tile.ld, count, leading(dim), buffer, result);
  }
};

// Rows of which what is not finite was replaced by zeros in a copy, if there was any. In a product
// over keys (rows) that not all rows (keys) see, a zero weight times NaN would be NaN.
template <typename T>
struct FiniteRows {
  const T* data;
  int64_t stride;
  bool copied;
};

template <typename T>
inline bool all_finite(const T* src, int64_t stride, int64_t rows, int64_t dim) {
  f32x16 probe = 0.0f;  // NaN once an infinity or a NaN was multiplied by zero
  const int64_t whole = dim / kLanes * kLanes;
  for (int64_t r = 0; r < rows; ++r) {
    const T* row = src + r * stride;
    for (int64_t d = 0; d < whole; d += kLanes) probe = probe + load_lanes(row + d) * 0.0f;
    if (whole < dim) probe = probe + load_lanes(row + whole, dim - whole, 0.0f) * 0.0f;
  }
  return !any(probe != probe);
}

inline bool all_finite(const double* src, int64_t stride, int64_t rows, int64_t dim) {
  double probe = 0.0;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t d = 0; d < dim; ++d) probe += src[r * stride + d] * 0.0;
  }
  return probe == probe;
}

template <typename Acc, typename T>
inline FiniteRows<T> finite_rows(const T* src, int64_t stride, int64_t rows, int64_t dim, T* copy) {
  if (all_finite(src, stride, rows, dim)) return {src, stride, false};
  std::memset(static_cast<void*>(copy), 0, static_cast<size_t>(rows * dim) * sizeof(T));
  for (int64_t r = 0; r < rows; ++r) {
    Acc row[padded_dim(256)];
    load_rows(src + r * stride, 0, 1, dim, row, padded_dim(dim));
    for (int64_t d = 0; d < dim; ++d) {
      if (row[d] * Acc(0) == Acc(0)) {
        std::memcpy(copy + r * dim + d, src + r * stride + d, sizeof(T));
      }
    }
  }
  return {copy, dim, true};
}

// fn(d, number) for each number of a row that is not finite.
template <typename Acc, typename T, typename Fn>
inline void for_nonfinite(const FiniteRows<T>& rows, int64_t r, int64_t dim, const Fn& fn) {
  Acc row[padded_dim(256)];
  if (load_rows(rows.data + r * rows.stride, 0, 1, dim, row, padded_dim(dim))) return;
  for (int64_t d = 0; d < dim; ++d) {
    if (!(row[d] * Acc(0) == Acc(0))) fn(d, row[d]);
  }
}

}  // namespace
}  // namespace winnow::CPU_CAPABILITY
