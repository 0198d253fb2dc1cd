// Products of tiles in shared memory, for a warp of 16 rows: tensor cores for two-byte elements,
// sums of products for wider ones, both with the layout of mma's sums. Thread i holds rows i / 4
// and i / 4 + 8 of every block of 8 columns, and of these columns 2 * (i % 4) and one more.
//
//   score   scores[row][key] = sum over d of rows[row][d] * keys[key][d]
//   weigh   out[row][d] += sum over keys of weights[row][key] * values[key][d]
//
// Forward and backward consist of these two.
#pragma once

#include <type_traits>

#include "common/device.h"

namespace winnow {
namespace {

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

constexpr int kWarpRows = 16;
constexpr int kDepth = 16;  // head dimensions are padded to whole steps of this many with zeros

// Elements of one copy, and distance of neighbouring rows of a tile: 16 bytes more than the row, so
// that no two of eight rows share a bank.
template <typename T>
constexpr int kPiece = 16 / sizeof(T);
template <typename T, int kDim>
constexpr int kLeading = kDim + kPiece<T>;

// Neighbouring keys that are multiplied or left out together.
template <typename T>
constexpr int kKeyBlock = sizeof(T) == 2 ? 16 : 8;

struct KeyBlocks {
  int begin, end;
};

template <typename T, int kColumns>
struct Fragment {
  Vector<Accumulator<T>, 4> block[kColumns / 8];

  WINNOW_DEVICE void clear() {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) block[n] = {};
  }
  // One of the thread's two rows.
  WINNOW_DEVICE void clear(int half) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      block[n].element[2 * half] = block[n].element[2 * half + 1] = 0;
    }
  }
};

// Two-byte elements on tensor cores.
template <typename T, int kDim, int kKeys>
struct MatrixProduct {
  static constexpr int kLd = kLeading<T, kDim>;
  static constexpr int kStagedColumns = 0;

  static WINNOW_DEVICE void score(Shared<T> rows, Shared<T> keys, int steps, KeyBlocks seen,
                                  Fragment<T, kKeys>* scores) {
    const int lane = lane_index();
    const Shared<T> row = rows + (lane % 16 * kLd + lane / 16 * 8);
    const Shared<T> key = keys + ((lane / 16 * 8 + lane % 8) * kLd + lane / 8 % 2 * 8);
    scores->clear();
    for (int k = 0; k < steps; ++k) {
      const auto a = load_matrices(row + k * kDepth);
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        if (n < seen.begin || n >= seen.end) continue;
        const auto b = load_matrices(key + (n * 16 * kLd + k * kDepth));
        mma<T>(&scores->block[2 * n], a, b.element[0], b.element[1]);
        mma<T>(&scores->block[2 * n + 1], a, b.element[2], b.element[3]);
      }
    }
  }

  static WINNOW_DEVICE void weigh(const Fragment<T, kKeys>& weights, Shared<T> values, int steps,
                                  KeyBlocks seen, Shared<Accumulator<T>>, Fragment<T, kDim>* out) {
    const int lane = lane_index();
    const Shared<T> value = values + (lane % 16 * kLd + lane / 16 * 8);
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      if (n < seen.begin || n >= seen.end) continue;
      Vector<uint32_t, 4> a;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto& pair = weights.block[2 * n + i / 2];
        a.element[i] = pack_pair<T>(pair.element[i % 2 * 2], pair.element[i % 2 * 2 + 1]);
      }
#pragma unroll
      for (int d = 0; d < kDim / kDepth; ++d) {
        if (d >= steps) continue;
        const auto b = load_matrices_transposed(value + (n * 16 * kLd + d * kDepth));
        mma<T>(&out->block[2 * d], a, b.element[0], b.element[1]);
        mma<T>(&out->block[2 * d + 1], a, b.element[2], b.element[3]);
      }
    }
  }
};

// float and double.
template <typename T, int kDim, int kKeys>
struct SumOfProducts {
  static constexpr int kLd = kLeading<T, kDim>;
  static constexpr int kStagedColumns =
      kKeys + kPiece<T>;  // weights[row] on their way to all lanes

  static WINNOW_DEVICE void score(Shared<T> rows, Shared<T> keys, int steps, KeyBlocks seen,
                                  Fragment<T, kKeys>* scores) {
    constexpr int N = kPiece<T>;
    const int lane = lane_index();
    const Shared<T> row = rows + lane / 4 * kLd;
    const Shared<T> key = keys + lane % 4 * 2 * kLd;
    scores->clear();
    for (int d = 0; d < steps * kDepth; d += N) {
      const auto low = load_vector<N>(row + d);
      const auto high = load_vector<N>(row + (8 * kLd + d));
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        if (n < seen.begin || n >= seen.end) continue;
        auto& sums = scores->block[n].element;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const auto other = load_vector<N>(key + ((n * 8 + e) * kLd + d));
#pragma unroll
          for (int i = 0; i < N; ++i) {
            sums[e] = fma(low.element[i], other.element[i], sums[e]);
            sums[2 + e] = fma(high.element[i], other.element[i], sums[2 + e]);
          }
        }
      }
    }
  }

  // staged: 16 rows of kStagedColumns for this warp alone.
  static WINNOW_DEVICE void weigh(const Fragment<T, kKeys>& weights, Shared<T> values, int steps,
                                  KeyBlocks seen, Shared<T> staged, Fragment<T, kDim>* out) {
    const int lane = lane_index();
    const Shared<T> low = staged + lane / 4 * kStagedColumns;
    const Shared<T> high = low + 8 * kStagedColumns;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      const auto& w = weights.block[n].element;
      store_vector(low + (n * 8 + lane % 4 * 2), Vector<T, 2>{{w[0], w[1]}});
      store_vector(high + (n * 8 + lane % 4 * 2), Vector<T, 2>{{w[2], w[3]}});
    }
    warp_sync(kFullWarp);
    for (int j = seen.begin * 8; j < seen.end * 8; ++j) {
      const T a = low[j];
      const T b = high[j];
      const Shared<T> value = values + (j * kLd + lane % 4 * 2);
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        if (n >= steps * (kDepth / 8)) continue;
        const auto v = load_vector<2>(value + n * 8);
        auto& sums = out->block[n].element;
        sums[0] = fma(a, v.element[0], sums[0]);
        sums[1] = fma(a, v.element[1], sums[1]);
        sums[2] = fma(b, v.element[0], sums[2]);
        sums[3] = fma(b, v.element[1], sums[3]);
      }
    }
    warp_sync(kFullWarp);
  }
};

template <typename T, int kDim, int kKeys>
using TileProduct = std::conditional_t<sizeof(T) == 2, MatrixProduct<T, kDim, kKeys>,
                                       SumOfProducts<T, kDim, kKeys>>;

// What infinite and NaN values add to the rows that see them; clear_nonfinite then keeps weigh from
// multiplying them by the zero weights of the others. sees(i, key): row lane / 4 + 8 * i.
template <typename T, int kDim, int kKeys, typename Sees>
WINNOW_DEVICE void weigh_nonfinite(const Fragment<T, kKeys>& weights, Shared<T> values, int steps,
                                   const Sees& sees, Fragment<T, kDim>* out) {
  using Acc = Accumulator<T>;
  const int lane = lane_index();
#pragma unroll 1
  for (int j = 0; j < kKeys; ++j) {
    Acc weight[2] = {};
    // Registers have no run-time index: every weight is looked at, and one of them taken.
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
      const auto pairs = weights.block[n];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const Acc w = pairs.element[e];
        weight[e / 2] = n * 2 + e % 2 == j / 8 * 2 + j % 2 ? w : weight[e / 2];
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      weight[i] = shuffle(kFullWarp, weight[i], lane / 4 * 4 + j % 8 / 2);
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      if (n >= steps * (kDepth / 8)) continue;
      const auto pair = load_vector<2>(values + (j * kLeading<T, kDim> + n * 8 + lane % 4 * 2));
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const Acc v = static_cast<Acc>(pair.element[e % 2]);
        if (v * Acc(0) != Acc(0) && sees(e / 2, j)) {
          out->block[n].element[e] = fma(weight[e / 2], v, out->block[n].element[e]);
        }
      }
    }
  }
}

// The tile's pieces of 16 bytes that belong to this thread: visit(offset, row, column).
template <typename T, int kDim, int kThreads, typename Visit>
WINNOW_DEVICE void own_pieces(int tile_rows, int steps, const Visit& visit) {
  constexpr int N = kPiece<T>;
  constexpr int kPieces = kDim / N;
  for (int i = thread_index(); i < tile_rows * kPieces; i += kThreads) {
    const int row = i / kPieces;
    const int column = i % kPieces * N;
    if (column < steps * kDepth) visit(row * kLeading<T, kDim> + column, row, column);
  }
}

// Rows of memory into a tile, zeros behind row `count` and column `dim`. The caller commits and
// waits. `vectors`: everything that is not zero is whole aligned pieces.
template <typename T, int kDim, int kThreads>
WINNOW_DEVICE void load_tile(Shared<T> tile, int tile_rows, Global<const T> rows, int64_t stride,
                             int count, int dim, int steps, bool vectors) {
  constexpr int N = kPiece<T>;
  own_pieces<T, kDim, kThreads>(tile_rows, steps, [&](int at, int row, int column) {
    const Global<const T> source = rows + (row < count ? row * stride + column : 0);
    if (vectors) {
      copy_async(tile + at, source, row < count && column < dim);
      return;
    }
    Vector<T, N> piece;
    for (int i = 0; i < N; ++i) {
      piece.element[i] = T(0.0f);
      if (row < count && column + i < dim) piece.element[i] = source[i];
    }
    store_vector(tile + at, piece);
  });
}

template <typename T>
WINNOW_DEVICE bool is_nonfinite(T x) {
  const auto wide = static_cast<Accumulator<T>>(x);
  return wide * Accumulator<T>(0) != Accumulator<T>(0);
}

// Whether what this thread loaded holds an infinity or NaN.
template <typename T, int kDim, int kThreads>
WINNOW_DEVICE bool loaded_nonfinite(Shared<T> tile, int tile_rows, int steps) {
  bool found = false;
  own_pieces<T, kDim, kThreads>(tile_rows, steps, [&](int at, int, int) {
    const auto piece = load_vector<kPiece<T>>(tile + at);
#pragma unroll
    for (int i = 0; i < kPiece<T>; ++i) found = found || is_nonfinite(piece.element[i]);
  });
  return found;
}

template <typename T, int kDim, int kThreads>
WINNOW_DEVICE void clear_nonfinite(Shared<T> tile, int tile_rows, int steps) {
  own_pieces<T, kDim, kThreads>(tile_rows, steps, [&](int at, int, int) {
    auto piece = load_vector<kPiece<T>>(tile + at);
    for (int i = 0; i < kPiece<T>; ++i) {
      if (is_nonfinite(piece.element[i])) piece.element[i] = T(0.0f);
    }
    store_vector(tile + at, piece);
  });
}

// One warp's row of a fragment, times `factor`, to memory. Pairs go as one store where dim is even,
// as results are contiguous.
template <typename To, typename T, int kDim>
WINNOW_DEVICE void store_fragment_row(const Fragment<T, kDim>& out, int half, Accumulator<T> factor,
                                      int dim, Global<To> row) {
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
    const int column = n * 8 + lane_index() % 4 * 2;
    const auto& sums = out.block[n].element;
    const auto low = static_cast<To>(sums[2 * half] * factor);
    const auto high = static_cast<To>(sums[2 * half + 1] * factor);
    if (column + 1 < dim && dim % 2 == 0) {
      store_vector(row + column, Vector<To, 2>{{low, high}});
    } else {
      if (column < dim) row[column] = low;
      if (column + 1 < dim) row[column + 1] = high;
    }
  }
}

}  // namespace
}  // namespace winnow
