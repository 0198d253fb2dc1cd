// Queries, keys and values as the operands of tile_product.h, for one way of multiplying. Keys and
// values are packed even where they could be used in place: products read an operand in small
// pieces, which waits for memory far longer than one pass over whole rows does.
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

// A copy with zeros for what is not finite: in a product over keys that some lanes don't see, zero
// weight times NaN would be NaN.
template <typename Acc>
inline void copy_finite(const Acc* src, int64_t count, Acc* dst) {
  for (int64_t i = 0; i < count; ++i) dst[i] = src[i] * Acc(0) == Acc(0) ? src[i] : Acc(0);
}

template <typename Acc>
inline void zero(Acc* dst, int64_t count) {
  for (int64_t i = 0; i < count; ++i) dst[i] = Acc(0);
}

template <typename T, class Math>
struct Pack;

// One number per operand: numbers of the accumulator's type.
template <typename T, typename Acc>
struct Pack<T, Multiply<Acc>> {
  static constexpr bool kSameType = std::is_same_v<T, Acc>;

  static constexpr int64_t leading(int64_t dim) { return padded_dim(dim); }

  // (row, dim), for products over dim.
  static OperandTile<Acc> rows(const T* src, int64_t stride, int64_t count, int64_t dim,
                               Acc* buffer) {
    load_rows(src, stride, count, dim, buffer, leading(dim));
    return {buffer, leading(dim)};
  }

  // (row, dim), for products over rows: with zeros for what is not finite, which is reported.
  static OperandTile<Acc> columns(const T* src, int64_t stride, int64_t count, int64_t dim,
                                  Acc* buffer, bool* finite) {
    *finite = load_rows(src, stride, count, dim, buffer, leading(dim));
    if (!*finite) copy_finite(buffer, count * leading(dim), buffer);
    return {buffer, leading(dim)};
  }

  // (dim, lane) out of rows; lanes from count on are zero.
  static void lanes(const T* src, int64_t stride, int64_t count, int64_t dim, Acc* rows,
                    Acc* result) {
    const int64_t ld = leading(dim);
    if constexpr (kSameType) {
      if (count == kTile && ld == dim) {
        transpose_tile(src, stride, kTile, dim, result, kTile);
        return;
      }
    }
    load_rows(src, stride, count, dim, rows, ld);
    zero(rows + count * ld, (kTile - count) * ld);
    transpose_tile(rows, ld, kTile, ld, result, kTile);
  }

  // Weights are made in place of the scores.
  static Acc* weights(Acc* scores, Acc*) { return scores; }
  static Acc weight(const Acc* weights, int64_t ld, int key, int lane) {
    return weights[key * ld + lane];
  }
};

}  // namespace
}  // namespace winnow::CPU_CAPABILITY
