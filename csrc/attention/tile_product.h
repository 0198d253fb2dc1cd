// The one matrix product of this family, C = scale * A B, C += A B or C = C * decay + A B, on
// tiles. A block of C stays in registers: R rows, whose A operands are broadcast, by W vectors of
// B. All products of attention and its gradient have this form: scores have keys in rows and
// queries in lanes, outputs and gradients have the head dimension in lanes, so that keys and values
// are used as they lie in memory and softmax needs no reduction within a vector.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>

#include "attention/problem.h"
#include "attention/vector_math.h"

namespace winnow::CPU_CAPABILITY {
namespace {

// The widest block, in vectors, and its rows: R * W accumulators, W operands and one broadcast fill
// 32 registers of AVX-512 and 16 of AVX2.
#if defined(__AVX512F__)
constexpr int kMaxWidth = 4;
constexpr int block_rows(int width) {
  return width == 4 ? 6 : width == 3 ? 8 : 12;
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
  // One vector of a sum's terms, as operands one after another.
  static void store_run(const Vec& terms, Operand* a) { terms.store(a); }
  // Where the operands that scores become are kept: in their place.
  static Operand* weights(Acc* scores, Operand*) { return scores; }
};

// Row r and depth k of A lie at a[r * row + k * step].
template <typename Operand>
struct Broadcasts {
  const Operand* a;
  int64_t row;
  int64_t step;
};

enum class Into {
  kScaled,   // C = A B * scale[0]
  kAdded,    // C += A B
  kDecayed,  // C = C * scale[row] + A B
};

// Out of line: there is one copy of each shape however many products use it.
template <class Math, Into kInto, int R, int W>
__attribute__((noinline)) void product_block(Broadcasts<typename Math::Operand> a,
                                             const typename Math::Operand* b, int64_t ldb,
                                             int64_t depth, typename Math::Acc* c, int64_t ldc,
                                             const typename Math::Acc* scale) {
  using Vec = typename Math::Vec;
  constexpr int kSize = Vec::size();
  Vec sum[R][W];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    const Vec decay(kInto == Into::kDecayed ? scale[r] : typename Math::Acc(1));
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      if constexpr (kInto == Into::kScaled) {
        sum[r][w] = Vec(typename Math::Acc(0));
      } else {
        sum[r][w] = Vec::loadu(c + r * ldc + w * kSize);
        if constexpr (kInto == Into::kDecayed) sum[r][w] = sum[r][w] * decay;
      }
    }
  }
  const typename Math::Operand* column = a.a;
  for (int64_t k = 0; k < depth; ++k, column += a.step, b += ldb) {
    decltype(Math::load(b)) row[W];
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) row[w] = Math::load(b + w * kSize);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const auto x = Math::broadcast(column + r * a.row);
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) sum[r][w] = Math::add(x, row[w], sum[r][w]);
    }
  }
  const Vec factor(kInto == Into::kScaled ? scale[0] : typename Math::Acc(1));
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w) {
      (kInto == Into::kScaled ? sum[r][w] * factor : sum[r][w]).store(c + r * ldc + w * kSize);
    }
  }
}

// a . b_r in lane r, for up to a vector of rows b_r, `ldb` apart; the other lanes are arbitrary.
template <class Math>
inline typename Math::Vec dot_rows(const typename Math::Operand* a, const typename Math::Operand* b,
                                   int64_t ldb, int count, int64_t depth) {
  using Vec = typename Math::Vec;
  constexpr int kSize = Vec::size();
  constexpr int kRows = kSize < 4 ? kSize : 4;  // at a time; a NEON register holds two doubles
  Vec sum[kSize];
  for (int r = 0; r < kSize; r += kRows) {
    if (r + kRows <= count) {
      Vec part[kRows];
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) part[i] = Vec(typename Math::Acc(0));
      for (int64_t k = 0; k < depth; k += kSize) {
        const auto x = Math::load(a + k);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
          part[i] = Math::add(x, Math::load(b + (r + i) * ldb + k), part[i]);
        }
      }
      for (int i = 0; i < kRows; ++i) sum[r + i] = part[i];
      continue;
    }
    for (int i = r; i < r + kRows; ++i) {
      sum[i] = Vec(typename Math::Acc(0));
      for (int64_t k = 0; k < depth && i < count; k += kSize) {
        sum[i] = Math::add(Math::load(a + k), Math::load(b + i * ldb + k), sum[i]);
      }
    }
  }
  return sum_rows<typename Math::Acc>(sum);
}

// Calls fn with the number as a constant, 1 to kMost.
template <int kMost, typename Fn>
inline void with_constant(int64_t number, const Fn& fn) {
  if constexpr (kMost > 1) {
    if (number < kMost) return with_constant<kMost - 1>(number, fn);
  }
  fn(std::integral_constant<int, kMost>());
}

// C has `rows` rows of W vectors. They are divided evenly: a last block of one or two rows would
// wait for the latency of its few sums.
template <class Math, Into kInto, int W>
inline void product(int64_t rows, Broadcasts<typename Math::Operand> a,
                    const typename Math::Operand* b, int64_t ldb, int64_t depth,
                    typename Math::Acc* c, int64_t ldc, const typename Math::Acc* scale) {
  constexpr int kRows = block_rows(W);
  for (int64_t left = (rows + kRows - 1) / kRows; left > 0; --left) {
    const int64_t count = (rows + left - 1) / left;
    with_constant<kRows>(count, [&](auto r) {
      product_block<Math, kInto, decltype(r)::value, W>(a, b, ldb, depth, c, ldc, scale);
    });
    rows -= count;
    a.a += count * a.row;
    c += count * ldc;
    if (kInto == Into::kDecayed) scale += count;
  }
}

// The same for R rows, or any number (0), and any number of columns that is a multiple of 16.
template <class Math, Into kInto, int R = 0>
inline void product_columns(Broadcasts<typename Math::Operand> a, const typename Math::Operand* b,
                            int64_t ldb, int64_t depth, int64_t columns, typename Math::Acc* c,
                            int64_t ldc, const typename Math::Acc* scale, int64_t rows = R) {
  constexpr int kSize = Math::Vec::size();
  for (int64_t x = 0; x < columns;) {
    const int64_t width = smaller((columns - x) / kSize, kMaxWidth);
    with_constant<kMaxWidth>(width, [&](auto w) {
      constexpr int kWidth = decltype(w)::value;
      if constexpr (R > 0) {
        product_block<Math, kInto, R, kWidth>(a, b + x, ldb, depth, c + x, ldc, scale);
      } else {
        product<Math, kInto, kWidth>(rows, a, b + x, ldb, depth, c + x, ldc, scale);
      }
    });
    x += width * kSize;
  }
}

}  // namespace
}  // namespace winnow::CPU_CAPABILITY
