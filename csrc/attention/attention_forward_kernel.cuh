// Forward of any pattern. A block takes kRows query rows of one head, a warp 16 of them; keys and
// values come in tiles through shared memory, copied one tile ahead; softmax is online, in base 2.
// A tile that no row sees is not visited, keys that no row of a warp sees are not multiplied.
// Traffic: queries and outputs once, slots once per tile of queries, local rows about once.
#pragma once

#include "attention/attention_walk.cuh"

namespace winnow {
namespace {

// At most 99 KiB of shared memory for each, what an Ada GPU has, and 255 registers.
template <typename T, int kDim>
struct ForwardShape {
  static constexpr int kWarps = sizeof(T) == 2 || kDim <= 128 ? 4 : sizeof(T) == 4 ? 2 : 1;
  static constexpr int kKeys = sizeof(T) == 2 ? (kDim <= 128 ? 64 : 32)
                               : kDim == 64   ? 32
                               : kDim == 128  ? 16
                                              : 8;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kThreads = kWarps * kWarp;
  using Product = TileProduct<T, kDim, kKeys>;
  static constexpr int kRowsTile = kRows * kLeading<T, kDim>;
  static constexpr int kKeysTile = kKeys * kLeading<T, kDim>;
  static constexpr int kStaged = kWarpRows * Product::kStagedColumns;
  static constexpr int64_t kSharedBytes =
      static_cast<int64_t>(sizeof(T)) * (kRowsTile + 4 * kKeysTile + kWarps * kStaged);
};

// Scores of one tile become weights; out and sum shrink to the new maximum.
template <typename T, int kDim, int kKeys>
WINNOW_DEVICE void online_softmax(const Bounds& bounds, int first, bool whole, Accumulator<T> scale,
                                  Fragment<T, kKeys>* scores, Accumulator<T> (&top)[2],
                                  Accumulator<T> (&sum)[2], Fragment<T, kDim>* out) {
  using Acc = Accumulator<T>;
  constexpr Acc kNone = -std::numeric_limits<Acc>::infinity();
  Acc largest[2] = {top[0], top[1]};
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      Acc& score = scores->block[n].element[e];
      score *= scale;
      const int key = first + n * 8 + lane_index() % 4 * 2 + e % 2;
      if (!whole && !bounds.own[e / 2].holds(key)) score = kNone;
      largest[e / 2] = score > largest[e / 2] ? score : largest[e / 2];
    }
  }
  Acc reference[2];
  Acc decay[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    for (int offset = 1; offset < 4; offset *= 2) {
      const Acc other = shuffle_xor(kFullWarp, largest[i], offset);
      largest[i] = other > largest[i] ? other : largest[i];
    }
    // Where nothing was seen yet the reference is 0, so that exp2(-inf - 0) = 0 and not NaN.
    reference[i] = largest[i] == kNone ? Acc(0) : largest[i];
    decay[i] = exp2_of(top[i] - reference[i]);
    top[i] = largest[i];
    sum[i] *= decay[i];
  }
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      Acc& weight = scores->block[n].element[e];
      weight = exp2_of(weight - reference[e / 2]);
      sum[e / 2] += weight;
    }
  }
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) out->block[n].element[e] *= decay[e / 2];
  }
}

template <typename T, int kDim>
WINNOW_KERNEL((ForwardShape<T, kDim>::kThreads))
attention_forward(AttentionCall<T> call, Global<T> results, Global<Accumulator<T>> lses) {
  using Acc = Accumulator<T>;
  using Shape = ForwardShape<T, kDim>;
  using Product = typename Shape::Product;
  constexpr int kKeys = Shape::kKeys;
  constexpr int kThreads = Shape::kThreads;
  const auto query = dynamic_shared<T>(0, Shape::kRowsTile);
  const auto tiles = dynamic_shared<T>(sizeof(T) * Shape::kRowsTile, 4 * Shape::kKeysTile);
  const auto staged = dynamic_shared<Acc>(sizeof(T) * (Shape::kRowsTile + 4 * Shape::kKeysTile),
                                          Shape::kWarps * Shape::kStaged) +
                      warp_index() * Shape::kStaged;

  const QueryTile rows(call, Shape::kRows);
  const KeyWalk<T, kDim, Shape::kWarps, kKeys> walk(call, rows);

  load_tile<T, kDim, kThreads>(query, Shape::kRows,
                               call.query.at(rows.batch, rows.head) + rows.first * call.query.row,
                               call.query.row, rows.count(), call.dim, call.steps, call.vectors);
  walk.fetch(0, tiles, tiles + Shape::kKeysTile);
  copy_commit();

  const Shared<T> own_query = query + warp_index() * kWarpRows * kLeading<T, kDim>;
  const Acc scale = call.scale * Acc(kLog2E);
  Acc top[2] = {-std::numeric_limits<Acc>::infinity(), -std::numeric_limits<Acc>::infinity()};
  Acc sum[2] = {};
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
        block_any(check && loaded_nonfinite<T, kDim, kThreads>(values, kKeys, call.steps));

    const Sight sight = sight_of<T, kKeys>(bounds.warp_low, bounds.warp_high, key);
    const bool sees_any = sight.blocks.begin < sight.blocks.end;
    Fragment<T, kKeys> weights;
    if (sees_any) {
      Product::score(own_query, keys, call.steps, sight.blocks, &weights);
      online_softmax<T, kDim, kKeys>(bounds, key, sight.whole, scale, &weights, top, sum, &out);
    }
    if (nonfinite) {
      if (sees_any) {
        weigh_nonfinite<T, kDim, kKeys>(
            weights, values, call.steps, [&](int i, int j) { return bounds.own[i].holds(key + j); },
            &out);
      }
      block_sync();
      clear_nonfinite<T, kDim, kThreads>(values, kKeys, call.steps);
      block_sync();
    }
    if (sees_any) Product::weigh(weights, values, call.steps, sight.blocks, staged, &out);
    block_sync();
  }
  copy_wait<0>();

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    for (int offset = 1; offset < 4; offset *= 2) {
      sum[i] += shuffle_xor(kFullWarp, sum[i], offset);
    }
    const int64_t row = rows.first + warp_index() * kWarpRows + lane_index() / 4 + 8 * i;
    if (row > rows.last) continue;
    const int64_t place = (rows.batch * call.query_heads + rows.head) * call.pattern.rows + row;
    const bool none = sum[i] == Acc(0);
    if (lane_index() % 4 == 0) {
      lses[place] =
          none ? -std::numeric_limits<Acc>::infinity() : (top[i] + std::log2(sum[i])) * Acc(kLn2);
    }
    if (none) out.clear(i);  // a factor of 0 would not: values without weight may be infinite
    store_fragment_row<T>(out, i, none ? Acc(0) : Acc(1) / sum[i], call.dim,
                          results + place * call.dim);
  }
}

}  // namespace
}  // namespace winnow
