// The one matrix product of this family, C = scale * A B or C = C * scale + A B, on packed tiles.
// A block of C stays in registers: R rows, whose A operands are broadcast, by W vectors of B. All
// six products of attention and its gradient have this form; scores are kept with keys in rows and
// queries in lanes, so that no product needs a transposed copy of the keys and softmax needs no
// reduction within a vector.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>

#include "attention/vector_math.h"

namespace winnow::CPU_CAPABILITY {
namespace {

// The widest block, in vectors, and its rows: R * W accumulators, W operands and one broadcast fill
// 32 registers of AVX-512 and 16 of AVX2.
#if defined(__AVX512F__)
constexpr int kMaxWidth = 4;
constexpr int block_rows(int width) {
  return width == 4 ? 6 : 8;
}
#elif defined(__AVX2__)
constexpr int kMaxWidth = 2;
constexpr int block_rows(int width) {
  return width == 2 ? 6 : 8;
}
#else
constexpr int kMaxWidth = 1;
constexpr int block_rows(int) {
  return 4;
}
#endif

// How operands multiply: one number each. An operand is what one broadcast of A and one lane of B
// hold; kDepth is how many terms of the sum that is.
template <typename T>
struct Multiply {
  using Acc = T;
  using Operand = T;
  static constexpr int kDepth = 1;
  using Vec = VecOf<Acc>;
  static Vec broadcast(const Operand* a) { return Vec(*a); }
  static Vec load(const Operand* b) { return Vec::loadu(b); }
  static Vec add(const Vec& a, const Vec& b, const Vec& c) { return at::vec::fmadd(a, b, c); }
  // kDepth vectors of a sum's terms, as one vector of operands.
  static void store(const Vec* terms, Operand* b) { terms->store(b); }
};

// Row r and depth k of A lie at a[r * row + k * step].
template <typename Operand>
struct Broadcasts {
  const Operand* a;
  int64_t row;
  int64_t step;
};

template <class Math, int R, int W, bool kAccumulate>
inline void product_block(Broadcasts<typename Math::Operand> a, const typename Math::Operand* b,
                          int64_t ldb, int64_t depth, typename Math::Acc* c, int64_t ldc,
                          const typename Math::Vec* scale) {
  using Vec = typename Math::Vec;
  constexpr int kSize = Vec::size();
  Vec sum[R][W];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      sum[r][w] =
          kAccumulate ? Vec::loadu(c + r * ldc + w * kSize) * scale[w] : Vec(typename Math::Acc(0));
    }
  }
  const typename Math::Operand* column = a.a;
  for (int64_t k = 0; k < depth; ++k, column += a.step, b += ldb) {
    decltype(Math::load(b)) row[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) row[w] = Math::load(b + w * kSize);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto x = Math::broadcast(column + r * a.row);
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) sum[r][w] = Math::add(x, row[w], sum[r][w]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      (kAccumulate ? sum[r][w] : sum[r][w] * scale[w]).store(c + r * ldc + w * kSize);
    }
  }
}

// C has `rows` rows of W vectors; scale holds one factor per lane.
template <class Math, int W, bool kAccumulate>
inline void product(int64_t rows, Broadcasts<typename Math::Operand> a,
                    const typename Math::Operand* b, int64_t ldb, int64_t depth,
                    typename Math::Acc* c, int64_t ldc, const typename Math::Vec* scale) {
  constexpr int kRows = block_rows(W);
  int64_t r = 0;
  const auto from = [&] {
    return Broadcasts<typename Math::Operand>{a.a + r * a.row, a.row, a.step};
  };
  for (; r + kRows <= rows; r += kRows) {
    product_block<Math, kRows, W, kAccumulate>(from(), b, ldb, depth, c + r * ldc, ldc, scale);
  }
  if constexpr (kRows > 4) {
    if (r + 4 <= rows) {
      product_block<Math, 4, W, kAccumulate>(from(), b, ldb, depth, c + r * ldc, ldc, scale);
      r += 4;
    }
  }
  if (r + 2 <= rows) {
    product_block<Math, 2, W, kAccumulate>(from(), b, ldb, depth, c + r * ldc, ldc, scale);
    r += 2;
  }
  if (r < rows) {
    product_block<Math, 1, W, kAccumulate>(from(), b, ldb, depth, c + r * ldc, ldc, scale);
  }
}

// Calls fn with the width as a constant.
template <typename Fn>
inline void with_width(int width, const Fn& fn) {
  if (width == 1) return fn(std::integral_constant<int, 1>());
  if constexpr (kMaxWidth >= 2) {
    if (width == 2) return fn(std::integral_constant<int, 2>());
  }
  if constexpr (kMaxWidth >= 4) {
    if (width == 3) return fn(std::integral_constant<int, 3>());
    return fn(std::integral_constant<int, 4>());
  }
}

// C += A B for any number of columns that is a multiple of 16.
template <class Math>
inline void product_columns(int64_t rows, Broadcasts<typename Math::Operand> a,
                            const typename Math::Operand* b, int64_t ldb, int64_t depth,
                            int64_t columns, typename Math::Acc* c, int64_t ldc) {
  using Vec = typename Math::Vec;
  constexpr int kSize = Vec::size();
  Vec one[kMaxWidth];
  for (Vec& vec : one) vec = Vec(typename Math::Acc(1));
  for (int64_t x = 0; x < columns;) {
    const int64_t left = (columns - x) / kSize;
    const int width = left < kMaxWidth ? static_cast<int>(left) : kMaxWidth;
    with_width(width, [&](auto w) {
      product<Math, decltype(w)::value, true>(rows, a, b + x, ldb, depth, c + x, ldc, one);
    });
    x += width * kSize;
  }
}

}  // namespace
}  // namespace winnow::CPU_CAPABILITY
