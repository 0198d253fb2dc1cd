// Backward of any pattern, without atomics: every gradient has one block that adds it up, in one
// order.
//   row_terms           per query row: log2 of its sum, and grad_out . out - grad_lse
//   query_gradients     as the forward walks: a tile of query rows through its keys
//   key_gradients       a tile of keys through the query rows that see it, for all heads of a group
//                       (key_gradients_kernel.cuh). Slots are seen by every later row: their query
//                       rows are split over blocks, which leave partial sums; in the interleaved
//                       layout the local gradient of a vector row is one of them
//   slot_gradients      adds the partial sums, in order
// With P the weights and dS = P (dO V^T - delta): dQ = dS K, dK = dS^T Q, dV = P^T dO, the first
// two times the scale. Traffic: the forward's three times, and the partial sums.
#pragma once

#include "attention/attention_walk.cuh"

namespace winnow {
namespace {

// Two resident tiles of rows, two streams of two. At most 99 KiB of shared memory but for double.
template <typename T, int kDim>
struct BackwardShape {
  static constexpr int kWarps = sizeof(T) == 2   ? (kDim <= 128 ? 4 : 2)
                                : sizeof(T) == 4 ? (kDim == 64    ? 4
                                                    : kDim == 128 ? 2
                                                                  : 1)
                                                 : 1;
  static constexpr int kKeys = sizeof(T) == 2   ? (kDim <= 128 ? 32 : 16)
                               : sizeof(T) == 4 ? (kDim == 64    ? 32
                                                   : kDim == 128 ? 16
                                                                 : 8)
                                                : 8;
  // Sums of both gradients of 256 columns would not fit the registers: each has its own block.
  static constexpr int kTargets = kDim <= 128 ? 1 : 2;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kThreads = kWarps * kWarp;
  using Product = TileProduct<T, kDim, kKeys>;
  static constexpr int kRowsTile = kRows * kLeading<T, kDim>;
  static constexpr int kKeysTile = kKeys * kLeading<T, kDim>;
  static constexpr int kStaged = kWarpRows * Product::kStagedColumns;
  static constexpr int kElements = 2 * kRowsTile + 4 * kKeysTile;
  static constexpr int64_t kSharedBytes =
      static_cast<int64_t>(sizeof(T)) * (kElements + kWarps * kStaged);
};

template <typename T>
struct BackwardCall {
  using Acc = Accumulator<T>;
  AttentionCall<T> forward;
  DeviceRows<T> grad_out;
  Global<const T> out;              // these are contiguous
  Global<const Acc> lse, grad_lse;  // (B, Hq, N)
  Global<Acc> log2_sums, deltas;    // (B, Hq, N)
  Global<T> grad_query, grad_key, grad_value, grad_slot_key, grad_slot_value;
  Global<Acc> parts;  // (part, B * Hkv, key or value, slots, dim)
  int splits;         // of the slots' query rows; one part more in the interleaved layout

  WINNOW_DEVICE int64_t part(int64_t part, int64_t head, int64_t kind, int64_t slot) const {
    const int64_t heads = forward.batch * forward.kv_heads;
    return (((part * heads + head) * 2 + kind) * forward.pattern.slots + slot) * forward.dim;
  }
};

constexpr int kTermThreads = 128;

// A warp per row.
template <typename T>
WINNOW_KERNEL(kTermThreads)
row_terms(BackwardCall<T> call) {
  using Acc = Accumulator<T>;
  constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
  const AttentionCall<T>& forward = call.forward;
  const int64_t row = block_index() * (kTermThreads / kWarp) + warp_index();
  const int64_t rows = forward.pattern.rows;
  if (row >= forward.batch * forward.query_heads * rows) return;
  const int64_t head = row / rows;
  const auto grad = call.grad_out.at(head / forward.query_heads, head % forward.query_heads) +
                    row % rows * call.grad_out.row;
  Acc sum = 0;
  for (int d = lane_index(); d < forward.dim; d += kWarp) {
    const T g = grad[d];
    const T o = call.out[row * forward.dim + d];
    sum = fma(static_cast<Acc>(g), static_cast<Acc>(o), sum);
  }
  sum = warp_reduce(sum, [](Acc a, Acc b) { return a + b; });
  if (lane_index() != 0) return;
  const Acc lse = call.lse[row];
  const Acc grad_lse = call.grad_lse[row];
  // A row that attends nothing has weights exp2(score - inf) = 0.
  call.log2_sums[row] = lse == -kInfinity ? kInfinity : lse * Acc(kLog2E);
  call.deltas[row] = sum - grad_lse;
}

// P and dS out of scores and dO V^T, in place. log2_sum(e), delta(e), seen(n, e): of element e of
// block n.
template <typename T, int kKeys, typename Log2Sum, typename Delta, typename Seen>
WINNOW_DEVICE void weights_and_gradients(Accumulator<T> scale, const Log2Sum& log2_sum,
                                         const Delta& delta, const Seen& seen,
                                         Fragment<T, kKeys>* scores, Fragment<T, kKeys>* grads) {
  using Acc = Accumulator<T>;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      Acc& score = scores->block[n].element[e];
      Acc& grad = grads->block[n].element[e];
      const bool sees = seen(n, e);
      const Acc weight = exp2_of(fma(score, scale, -log2_sum(n, e)));
      const Acc change = weight * (grad - delta(n, e));
      score = sees ? weight : Acc(0);
      grad = sees ? change : Acc(0);
    }
  }
}

template <typename T, int kDim>
WINNOW_KERNEL((BackwardShape<T, kDim>::kThreads))
query_gradients(BackwardCall<T> backward) {
  using Acc = Accumulator<T>;
  using Shape = BackwardShape<T, kDim>;
  using Product = typename Shape::Product;
  constexpr int kKeys = Shape::kKeys;
  constexpr int kThreads = Shape::kThreads;
  const AttentionCall<T>& call = backward.forward;
  const auto query = dynamic_shared<T>(0, Shape::kRowsTile);
  const auto grad_out = dynamic_shared<T>(sizeof(T) * Shape::kRowsTile, Shape::kRowsTile);
  const auto tiles = dynamic_shared<T>(sizeof(T) * 2 * Shape::kRowsTile, 4 * Shape::kKeysTile);
  const auto staged =
      dynamic_shared<Acc>(sizeof(T) * Shape::kElements, Shape::kWarps * Shape::kStaged) +
      warp_index() * Shape::kStaged;

  const QueryTile rows(call, Shape::kRows);
  const KeyWalk<T, kDim, Shape::kWarps, kKeys> walk(call, rows);

  const auto load = [&](Shared<T> tile, const DeviceRows<T>& source) {
    load_tile<T, kDim, kThreads>(tile, Shape::kRows,
                                 source.at(rows.batch, rows.head) + rows.first * source.row,
                                 source.row, rows.count(), call.dim, call.steps, call.vectors);
  };
  load(query, call.query);
  load(grad_out, backward.grad_out);
  walk.fetch(0, tiles, tiles + Shape::kKeysTile);
  copy_commit();

  const int own_rows = warp_index() * kWarpRows * kLeading<T, kDim>;
  const Acc scale = call.scale * Acc(kLog2E);
  const int64_t head_rows = (rows.batch * call.query_heads + rows.head) * call.pattern.rows;
  Acc log2_sum[2];
  Acc delta[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = rows.first + warp_index() * kWarpRows + lane_index() / 4 + 8 * i;
    log2_sum[i] = backward.log2_sums[head_rows + smaller(row, rows.last)];
    delta[i] = backward.deltas[head_rows + smaller(row, rows.last)];
  }
  Fragment<T, kDim> out;
  out.clear();
  for (int t = 0; t < walk.tiles; ++t) {
    const Shared<T> keys = tiles + t % 2 * 2 * Shape::kKeysTile;
    const Shared<T> values = keys + Shape::kKeysTile;
    if (t + 1 < walk.tiles) {
      const Shared<T> next = tiles + (t + 1) % 2 * 2 * Shape::kKeysTile;
      walk.fetch(t + 1, next, next + Shape::kKeysTile);
    }
    copy_commit();
    copy_wait<1>();
    const Bounds bounds = walk.bounds(t);
    const int key = walk.first_key(t);
    const bool check = !sight_of<T, kKeys>(bounds.block_low, bounds.block_high, key).whole;
    const bool nonfinite =
        block_any(check && loaded_nonfinite<T, kDim, kThreads>(keys, kKeys, call.steps));

    const Sight sight = sight_of<T, kKeys>(bounds.warp_low, bounds.warp_high, key);
    const bool sees_any = sight.blocks.begin < sight.blocks.end;
    Fragment<T, kKeys> grads;
    if (sees_any) {
      Fragment<T, kKeys> weights;
      Product::score(query + own_rows, keys, call.steps, sight.blocks, &weights);
      Product::score(grad_out + own_rows, values, call.steps, sight.blocks, &grads);
      weights_and_gradients<T, kKeys>(
          scale, [&](int, int e) { return log2_sum[e / 2]; },
          [&](int, int e) { return delta[e / 2]; },
          [&](int n, int e) {
            const int column = key + n * 8 + lane_index() % 4 * 2 + e % 2;
            return sight.whole || bounds.own[e / 2].holds(column);
          },
          &weights, &grads);
    }
    if (nonfinite) {
      if (sees_any) {
        weigh_nonfinite<T, kDim, kKeys>(
            grads, keys, call.steps, [&](int i, int j) { return bounds.own[i].holds(key + j); },
            &out);
      }
      block_sync();
      clear_nonfinite<T, kDim, kThreads>(keys, kKeys, call.steps);
      block_sync();
    }
    if (sees_any) Product::weigh(grads, keys, call.steps, sight.blocks, staged, &out);
    block_sync();
  }
  copy_wait<0>();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = rows.first + warp_index() * kWarpRows + lane_index() / 4 + 8 * i;
    if (row > rows.last) continue;
    store_fragment_row<T>(out, i, call.scale, call.dim,
                          backward.grad_query + (head_rows + row) * call.dim);
  }
}

}  // namespace
}  // namespace winnow
