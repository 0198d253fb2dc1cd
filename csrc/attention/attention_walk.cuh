// What the attention kernels are told, and the walk over the keys that a tile of query rows sees:
// first slots, then local rows, in tiles that are copied one ahead of their use.
#pragma once

#include "attention/pattern.h"
#include "attention/tile_fragments.cuh"

namespace winnow {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

WINNOW_DEVICE float exp2_of(float x) {
  return fast_exp2(x);
}
WINNOW_DEVICE double exp2_of(double x) {
  return exp2(x);
}

// (batch, heads, rows, dim) with a contiguous last dimension; strides in elements.
template <typename T>
struct DeviceRows {
  Global<const T> data;
  int64_t batch, head, row;

  WINNOW_DEVICE Global<const T> at(int64_t b, int64_t h) const {
    return data + (b * batch + h * head);
  }
};

template <typename T>
struct AttentionCall {
  PatternOf<Global<const int64_t>> pattern;
  DeviceRows<T> query, key, value, slot_key, slot_value;
  int64_t batch, query_heads, kv_heads;
  int dim;
  int steps;     // of kDepth, that cover dim
  bool vectors;  // every row above is made of aligned pieces of 16 bytes
  Accumulator<T> scale;
};

// A run of keys that a query row sees, or of query rows that see a key. Both ends ascend with the
// row, so that the first and the last row of a tile bound what all of them see.
struct Span {
  int begin, end;

  WINNOW_DEVICE bool holds(int place) const { return begin <= place && place < end; }
};

struct RowSpans {
  Span slots, locals;
};

template <typename Table>
WINNOW_DEVICE RowSpans keys_of_row(const PatternOf<Table>& pattern, int64_t row) {
  const Chunk chunk = chunk_of(pattern, row);
  return {{static_cast<int>(chunk.slot_begin), static_cast<int>(chunk.slot_end)},
          {static_cast<int>(chunk.local_begin),
           static_cast<int>(pattern.causal ? row + 1 : chunk.end)}};
}

// The inverses.
template <typename Table>
WINNOW_DEVICE Span rows_of_local(const PatternOf<Table>& pattern, int64_t row) {
  const Chunk chunk = chunk_of(pattern, row);
  const int64_t end = sequence_at(pattern, pattern.row_begin, row).end;
  const int64_t reach = chunk.begin + (pattern.lookback + 1) * pattern.chunk_size;
  return {static_cast<int>(pattern.causal ? row : chunk.begin),
          static_cast<int>(smaller(reach, end))};
}
template <typename Table>
WINNOW_DEVICE Span rows_of_slot(const PatternOf<Table>& pattern, int64_t slot) {
  const Sequence sequence = sequence_at(pattern, pattern.slot_begin, slot);
  const int64_t later = slot - sequence.slot_begin - pattern.initial_slots;
  const int64_t chunk = later < 0 ? 0 : later / pattern.slots_per_chunk + 1;
  const int64_t begin = smaller(sequence.begin + chunk * pattern.chunk_size, sequence.end);
  // Behind the slots of the last sequence there may be some that nobody sees.
  return {static_cast<int>(slot < sequence.slot_end ? begin : sequence.end),
          static_cast<int>(sequence.end)};
}

// Which of the tile's keys, `first` to first + kKeys - 1, a run of rows sees, given the spans of
// its first and last row.
struct Sight {
  KeyBlocks blocks;  // empty where no row sees any
  bool whole;        // every row sees every key
};
template <typename T, int kKeys>
WINNOW_DEVICE Sight sight_of(Span low, Span high, int first) {
  constexpr int kBlock = kKeyBlock<T>;
  const int begin = low.begin > first ? low.begin - first : 0;
  const int end = high.end - first < kKeys ? high.end - first : kKeys;
  const bool whole = high.begin <= first && low.end >= first + kKeys;
  if (begin >= end) return {{0, 0}, whole};
  return {{begin / kBlock, (end + kBlock - 1) / kBlock}, whole};
}

WINNOW_DEVICE Span span_of_lane(Span span, int lane) {
  return {shuffle(kFullWarp, span.begin, lane), shuffle(kFullWarp, span.end, lane)};
}

// The spans of a thread's two rows in one source, and what bounds those of its warp and its block.
struct Bounds {
  Span own[2];
  Span warp_low, warp_high;
  Span block_low, block_high;

  WINNOW_DEVICE void share() {
    warp_low = span_of_lane(own[0], 0);
    warp_high = span_of_lane(own[1], kWarp - 1);
  }
};

// The query rows of a block: `first` to `last` of one head. The last rows see most: they come
// first, those of all heads together.
struct QueryTile {
  int64_t batch, head, kv_head;
  int64_t first, last;

  template <typename T>
  WINNOW_DEVICE QueryTile(const AttentionCall<T>& call, int rows) {
    const int64_t heads = call.batch * call.query_heads;
    batch = block_index() % heads / call.query_heads;
    head = block_index() % heads % call.query_heads;
    kv_head = head / (call.query_heads / call.kv_heads);
    first = (ceil_div<int64_t>(call.pattern.rows, rows) - 1 - block_index() / heads) * rows;
    last = smaller(first + rows, call.pattern.rows) - 1;
  }
  WINNOW_DEVICE int count() const { return static_cast<int>(last - first) + 1; }
};

// kWarps warps of 16 query rows. Rows behind the last one are taken for the last one.
template <typename T, int kDim, int kWarps, int kKeys>
struct KeyWalk {
  static constexpr int kThreads = kWarps * kWarp;

  const AttentionCall<T>& call;
  Global<const T> slot_key, slot_value, local_key, local_value;
  Bounds slots, locals;
  int slot_tiles, tiles;

  WINNOW_DEVICE KeyWalk(const AttentionCall<T>& call, const QueryTile& rows)
      : call(call),
        slot_key(call.slot_key.at(rows.batch, rows.kv_head)),
        slot_value(call.slot_value.at(rows.batch, rows.kv_head)),
        local_key(call.key.at(rows.batch, rows.kv_head)),
        local_value(call.value.at(rows.batch, rows.kv_head)) {
    const int64_t row = rows.first + warp_index() * kWarpRows + lane_index() / 4;
    const RowSpans low = keys_of_row(call.pattern, rows.first);
    const RowSpans high = keys_of_row(call.pattern, rows.last);
    for (int i = 0; i < 2; ++i) {
      const RowSpans own = keys_of_row(call.pattern, smaller(row + 8 * i, rows.last));
      slots.own[i] = own.slots;
      locals.own[i] = own.locals;
    }
    slots.share();
    locals.share();
    slots.block_low = low.slots;
    slots.block_high = high.slots;
    locals.block_low = low.locals;
    locals.block_high = high.locals;
    const int slot_count = high.slots.end - low.slots.begin;
    slot_tiles = slot_count > 0 ? ceil_div(slot_count, kKeys) : 0;
    tiles = slot_tiles + ceil_div(high.locals.end - low.locals.begin, kKeys);
  }

  // By value: a reference to either would keep both out of registers.
  WINNOW_DEVICE Bounds bounds(int t) const { return t < slot_tiles ? slots : locals; }
  WINNOW_DEVICE int first_key(int t) const {
    return t < slot_tiles ? slots.block_low.begin + t * kKeys
                          : locals.block_low.begin + (t - slot_tiles) * kKeys;
  }

  // Tile t's keys and values, to two tiles of shared memory.
  WINNOW_DEVICE void fetch(int t, Shared<T> keys, Shared<T> values) const {
    const bool slot = t < slot_tiles;
    const int64_t first = first_key(t);
    const int64_t key_stride = slot ? call.slot_key.row : call.key.row;
    const int64_t value_stride = slot ? call.slot_value.row : call.value.row;
    const int left = bounds(t).block_high.end - static_cast<int>(first);
    const int count = left < kKeys ? left : kKeys;
    load_tile<T, kDim, kThreads>(keys, kKeys, (slot ? slot_key : local_key) + first * key_stride,
                                 key_stride, count, call.dim, call.steps, call.vectors);
    load_tile<T, kDim, kThreads>(values, kKeys,
                                 (slot ? slot_value : local_value) + first * value_stride,
                                 value_stride, count, call.dim, call.steps, call.vectors);
  }
};

}  // namespace
}  // namespace winnow
