// Gradients of keys and values: attention_backward_kernel.cuh says how the backward is divided. A
// tile of keys stays in shared memory while the query rows that see any of them come by, copied one
// tile ahead, head after head of the group.
#pragma once

#include "attention/attention_backward_kernel.cuh"

namespace winnow {
namespace {

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

template <typename T, int kKeys>
WINNOW_DEVICE Fragment<T, kKeys> either(bool first, const Fragment<T, kKeys>& a,
                                        const Fragment<T, kKeys>& b) {
  Fragment<T, kKeys> chosen;
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const Accumulator<T> x = a.block[n].element[e];
      const Accumulator<T> y = b.block[n].element[e];
      chosen.block[n].element[e] = first ? x : y;
    }
  }
  return chosen;
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
  constexpr int kSums = kBoth ? 2 : 1;
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
  Fragment<T, kDim> sums[kSums];  // of the key's and the value's gradient, or of one of them
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
    // Calls fn(weights, tile of rows, sums) for each gradient of this block.
    const auto for_each_sum = [&](const auto& fn) {
      if constexpr (kBoth) {
        fn(grads, queries, &sums[0]);
        fn(weights, grad_outs, &sums[1]);
      } else {
        fn(either<T, kKeys>(wants_key, grads, weights), wants_key ? queries : grad_outs, &sums[0]);
      }
    };
    if (nonfinite) {
      if (sees_any) {
        for_each_sum([&](const auto& factors, Shared<T> rows, Fragment<T, kDim>* sum) {
          weigh_nonfinite<T, kDim, kKeys>(factors, rows, call.steps, sees, sum);
        });
      }
      block_sync();
      clear_nonfinite<T, kDim, kThreads>(queries, kKeys, call.steps);
      clear_nonfinite<T, kDim, kThreads>(grad_outs, kKeys, call.steps);
      block_sync();
    }
    if (sees_any) {
      for_each_sum([&](const auto& factors, Shared<T> rows, Fragment<T, kDim>* sum) {
        Product::weigh(factors, rows, call.steps, sight.blocks, staged, sum);
      });
    }
    block_sync();
  }
  copy_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t key = own_key + 8 * half;
    if (key > last) continue;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const bool of_key = kBoth ? i == 0 : wants_key;
      store_key_gradient(backward, slots, split, kv_head, of_key ? 0 : 1, key, half, sums[i]);
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
