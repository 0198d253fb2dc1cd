// Backward of any pattern, without atomics: every gradient has one block that adds it up, in one
// order.
//   row_terms           per query row: log2 of its sum, and grad_out . out - grad_lse
//   query_gradients     as the forward walks: a tile of query rows through its keys
//   key_gradients       a tile of keys through the query rows that see it, for all heads of a
//   group.
//                       Slots are seen by every later row: their query rows are split over blocks,
//                       which leave partial sums; in the interleaved layout the local gradient of a
//                       vector row is one of them
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

  const int64_t heads = call.batch * call.query_heads;
  const int64_t row_tiles = ceil_div<int64_t>(call.pattern.rows, Shape::kRows);
  const int64_t batch = block_index() % heads / call.query_heads;
  const int64_t head = block_index() % heads % call.query_heads;
  const int64_t first = (row_tiles - 1 - block_index() / heads) * Shape::kRows;
  const int64_t last = smaller(first + Shape::kRows, call.pattern.rows) - 1;
  const int count = static_cast<int>(last - first) + 1;
  const KeyWalk<T, kDim, Shape::kWarps, kKeys> walk(
      call, batch, head / (call.query_heads / call.kv_heads), first, last);

  load_tile<T, kDim, kThreads>(query, Shape::kRows,
                               call.query.at(batch, head) + first * call.query.row, call.query.row,
                               count, call.dim, call.steps, call.vectors);
  load_tile<T, kDim, kThreads>(grad_out, Shape::kRows,
                               backward.grad_out.at(batch, head) + first * backward.grad_out.row,
                               backward.grad_out.row, count, call.dim, call.steps, call.vectors);
  walk.fetch(0, tiles, tiles + Shape::kKeysTile);
  copy_commit();

  const int own_rows = warp_index() * kWarpRows * kLeading<T, kDim>;
  const Acc scale = call.scale * Acc(kLog2E);
  const int64_t head_rows = (batch * call.query_heads + head) * call.pattern.rows;
  Acc log2_sum[2];
  Acc delta[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t row = first + warp_index() * kWarpRows + lane_index() / 4 + 8 * i;
    log2_sum[i] = backward.log2_sums[head_rows + smaller(row, last)];
    delta[i] = backward.deltas[head_rows + smaller(row, last)];
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
    const int64_t row = first + warp_index() * kWarpRows + lane_index() / 4 + 8 * i;
    if (row > last) continue;
    store_fragment_row<T>(out, i, call.scale, call.dim,
                          backward.grad_query + (head_rows + row) * call.dim);
  }
}

// The query rows that a tile of keys goes through: those of every head of the group in turn.
template <typename T, int kDim, int kKeys, int kThreads>
struct QueryWalk {
  const BackwardCall<T>& backward;
  int64_t batch, first_head;  // of the group
  int begin, end;             // query rows
  int per_head, tiles;

  WINNOW_DEVICE int first_row(int t) const { return begin + t % per_head * kKeys; }
  WINNOW_DEVICE int64_t head(int t) const { return first_head + t / per_head; }

  WINNOW_DEVICE void fetch(int t, Shared<T> queries, Shared<T> grads) const {
    const AttentionCall<T>& call = backward.forward;
    const int64_t row = first_row(t);
    const int left = end - static_cast<int>(row);
    const int count = left < kKeys ? left : kKeys;
    load_tile<T, kDim, kThreads>(queries, kKeys,
                                 call.query.at(batch, head(t)) + row * call.query.row,
                                 call.query.row, count, call.dim, call.steps, call.vectors);
    load_tile<T, kDim, kThreads>(grads, kKeys,
                                 backward.grad_out.at(batch, head(t)) + row * backward.grad_out.row,
                                 backward.grad_out.row, count, call.dim, call.steps, call.vectors);
  }
};

// Where a key's gradient goes: to the result, or to a part of the sums over splits.
template <typename T, int kDim>
WINNOW_DEVICE void store_key_gradient(const BackwardCall<T>& backward, bool slots, int64_t split,
                                      int64_t kv_head, int64_t kind, int64_t key, int half,
                                      const Fragment<T, kDim>& out) {
  using Acc = Accumulator<T>;
  const AttentionCall<T>& call = backward.forward;
  const Acc factor = kind == 0 ? call.scale : Acc(1);
  const bool vector_row = call.pattern.interleaved && key % call.pattern.chunk_size == 0;
  if (slots || vector_row) {
    const int64_t slot = slots ? key : key / call.pattern.chunk_size;
    const int64_t part = slots ? split : backward.splits;
    store_fragment_row<Acc>(out, half, factor, call.dim,
                            backward.parts + backward.part(part, kv_head, kind, slot));
    return;
  }
  const Global<T> results = kind == 0 ? backward.grad_key : backward.grad_value;
  store_fragment_row<T>(out, half, factor, call.dim,
                        results + (kv_head * call.pattern.rows + key) * call.dim);
}

// Grid: tiles of keys by heads, splits by targets.
template <typename T, int kDim>
WINNOW_KERNEL((BackwardShape<T, kDim>::kThreads))
key_gradients(BackwardCall<T> backward, bool slots, int splits) {
  using Acc = Accumulator<T>;
  using Shape = BackwardShape<T, kDim>;
  using Product = typename Shape::Product;
  constexpr int kKeys = Shape::kKeys;
  constexpr int kThreads = Shape::kThreads;
  constexpr bool kBoth = Shape::kTargets == 1;
  const AttentionCall<T>& call = backward.forward;
  const auto keys = dynamic_shared<T>(0, Shape::kRowsTile);
  const auto values = dynamic_shared<T>(sizeof(T) * Shape::kRowsTile, Shape::kRowsTile);
  const auto tiles = dynamic_shared<T>(sizeof(T) * 2 * Shape::kRowsTile, 4 * Shape::kKeysTile);
  const auto staged =
      dynamic_shared<Acc>(sizeof(T) * Shape::kElements, Shape::kWarps * Shape::kStaged) +
      warp_index() * Shape::kStaged;

  const int64_t heads = call.batch * call.kv_heads;
  const int64_t kv_head = block_index() % heads;
  const int64_t split = block_index_y() / Shape::kTargets;
  const bool wants_key = kBoth || block_index_y() % Shape::kTargets == 0;
  const bool wants_value = kBoth || !wants_key;
  const int64_t first = block_index() / heads * Shape::kRows;
  const int64_t last =
      smaller(first + Shape::kRows, slots ? call.pattern.slots : call.pattern.rows) - 1;

  const auto rows_of_key = [&](int64_t key) {
    return slots ? rows_of_slot(call.pattern, key) : rows_of_local(call.pattern, key);
  };
  const int64_t own_key = first + warp_index() * kWarpRows + lane_index() / 4;
  Bounds bounds;
  bounds.own[0] = rows_of_key(smaller(own_key, last));
  bounds.own[1] = rows_of_key(smaller(own_key + 8, last));
  bounds.block_low = rows_of_key(first);
  bounds.block_high = rows_of_key(last);
  bounds.share();

  const int64_t group = call.query_heads / call.kv_heads;
  QueryWalk<T, kDim, kKeys, kThreads> walk{
      backward, kv_head / call.kv_heads, kv_head % call.kv_heads * group, 0, 0, 0, 0};
  const int total = ceil_div(larger(bounds.block_high.end - bounds.block_low.begin, 0),
                             static_cast<int64_t>(kKeys));
  const int per_split = ceil_div(total, splits);
  walk.begin = bounds.block_low.begin + static_cast<int>(split) * per_split * kKeys;
  walk.end = static_cast<int>(
      smaller(bounds.block_high.end, walk.begin + static_cast<int64_t>(per_split) * kKeys));
  walk.per_head = walk.end > walk.begin ? ceil_div(walk.end - walk.begin, kKeys) : 0;
  walk.tiles = walk.per_head * static_cast<int>(group);

  const int64_t batch = walk.batch;
  const int64_t own_head = kv_head % call.kv_heads;
  const DeviceRows<T>& key_rows = slots ? call.slot_key : call.key;
  const DeviceRows<T>& value_rows = slots ? call.slot_value : call.value;
  const int count = static_cast<int>(last - first) + 1;
  load_tile<T, kDim, kThreads>(keys, Shape::kRows,
                               key_rows.at(batch, own_head) + first * key_rows.row, key_rows.row,
                               count, call.dim, call.steps, call.vectors);
  load_tile<T, kDim, kThreads>(values, Shape::kRows,
                               value_rows.at(batch, own_head) + first * value_rows.row,
                               value_rows.row, count, call.dim, call.steps, call.vectors);
  if (walk.tiles > 0) walk.fetch(0, tiles, tiles + Shape::kKeysTile);
  copy_commit();

  const int own_rows = warp_index() * kWarpRows * kLeading<T, kDim>;
  const Acc scale = call.scale * Acc(kLog2E);
  Fragment<T, kDim> sums[kBoth ? 2 : 1];  // of the key's and the value's gradient
  for (auto& sum : sums) sum.clear();
  for (int t = 0; t < walk.tiles; ++t) {
    const Shared<T> queries = tiles + t % 2 * 2 * Shape::kKeysTile;
    const Shared<T> grad_outs = queries + Shape::kKeysTile;
    if (t + 1 < walk.tiles) {
      const Shared<T> next = tiles + (t + 1) % 2 * 2 * Shape::kKeysTile;
      walk.fetch(t + 1, next, next + Shape::kKeysTile);
    }
    copy_commit();
    copy_wait<1>();
    const int row = walk.first_row(t);
    const bool check = !sight_of<T, kKeys>(bounds.block_low, bounds.block_high, row).whole;
    const bool nonfinite =
        block_any(check && (loaded_nonfinite<T, kDim, kThreads>(queries, kKeys, call.steps) ||
                            loaded_nonfinite<T, kDim, kThreads>(grad_outs, kKeys, call.steps)));

    Sight sight = sight_of<T, kKeys>(bounds.warp_low, bounds.warp_high, row);
    // Rows behind the split's last one are zeros here and another block's there.
    const bool whole = sight.whole && row + kKeys <= walk.end;
    const bool sees_any = sight.blocks.begin < sight.blocks.end;
    Fragment<T, kKeys> weights;
    Fragment<T, kKeys> grads;
    const auto sees = [&](int i, int j) {
      return bounds.own[i].holds(row + j) && row + j < walk.end;
    };
    if (sees_any) {
      const int64_t head_rows = (batch * call.query_heads + walk.head(t)) * call.pattern.rows;
      const auto place = [&](int n, int e) {
        return head_rows + smaller(row + n * 8 + lane_index() % 4 * 2 + e % 2, walk.end - 1);
      };
      Product::score(keys + own_rows, queries, call.steps, sight.blocks, &weights);
      grads.clear();
      if (wants_key) {
        Product::score(values + own_rows, grad_outs, call.steps, sight.blocks, &grads);
      }
      weights_and_gradients<T, kKeys>(
          scale,
          [&](int n, int e) {
            const Acc log2_sum = backward.log2_sums[place(n, e)];
            return log2_sum;
          },
          [&](int n, int e) {
            const Acc delta = backward.deltas[place(n, e)];
            return delta;
          },
          [&](int n, int e) { return whole || sees(e / 2, n * 8 + lane_index() % 4 * 2 + e % 2); },
          &weights, &grads);
    }
    if (nonfinite) {
      if (sees_any) {
        if (wants_key) {
          weigh_nonfinite<T, kDim, kKeys>(grads, queries, call.steps, sees, &sums[0]);
        }
        if (wants_value) {
          weigh_nonfinite<T, kDim, kKeys>(weights, grad_outs, call.steps, sees,
                                          &sums[kBoth ? 1 : 0]);
        }
      }
      block_sync();
      clear_nonfinite<T, kDim, kThreads>(queries, kKeys, call.steps);
      clear_nonfinite<T, kDim, kThreads>(grad_outs, kKeys, call.steps);
      block_sync();
    }
    if (sees_any) {
      if (wants_key) {
        Product::weigh(grads, queries, call.steps, sight.blocks, staged, &sums[0]);
      }
      if (wants_value) {
        Product::weigh(weights, grad_outs, call.steps, sight.blocks, staged, &sums[kBoth ? 1 : 0]);
      }
    }
    block_sync();
  }
  copy_wait<0>();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t key = own_key + 8 * i;
    if (key > last) continue;
    if (wants_key) store_key_gradient(backward, slots, split, kv_head, 0, key, i, sums[0]);
    if (wants_value) {
      store_key_gradient(backward, slots, split, kv_head, 1, key, i, sums[kBoth ? 1 : 0]);
    }
  }
}

constexpr int kSumThreads = 256;

// A thread per element.
template <typename T>
WINNOW_KERNEL(kSumThreads)
slot_gradients(BackwardCall<T> backward) {
  using Acc = Accumulator<T>;
  const auto& pattern = backward.forward.pattern;
  const int64_t dim = backward.forward.dim;
  const int64_t per_head = 2 * pattern.slots * dim;
  const int64_t elements = backward.forward.batch * backward.forward.kv_heads * per_head;
  const int64_t i = block_index() * kSumThreads + thread_index();
  if (i >= elements) return;
  const int parts = backward.splits + (pattern.interleaved ? 1 : 0);
  Acc sum = 0;
  for (int part = 0; part < parts; ++part) {
    const Acc value = backward.parts[part * elements + i];
    sum += value;
  }
  const int64_t head = i / per_head;
  const bool value = i % per_head >= pattern.slots * dim;
  const int64_t slot = i / dim % pattern.slots;
  if (pattern.interleaved) {
    const int64_t row = head * pattern.rows + slot * pattern.chunk_size;
    (value ? backward.grad_value : backward.grad_key)[row * dim + i % dim] = static_cast<T>(sum);
  } else {
    const int64_t row = head * pattern.slots + slot;
    (value ? backward.grad_slot_value : backward.grad_slot_key)[row * dim + i % dim] =
        static_cast<T>(sum);
  }
}

}  // namespace
}  // namespace winnow
