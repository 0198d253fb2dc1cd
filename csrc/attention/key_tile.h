// One tile of keys against one tile of query rows: which vectors of lanes see which keys, so that a
// product runs where something is visible and nowhere else.
#pragma once

#include <cstdint>

#include "attention/problem.h"
#include "attention/tile_product.h"

namespace winnow::CPU_CAPABILITY {
namespace {

// Per lane (query row) of a tile, the keys [begin, end) of one source that it sees.
struct LaneRanges {
  int64_t begin[kTile];
  int64_t end[kTile];

  void clear() {
    for (int lane = 0; lane < kTile; ++lane) begin[lane] = end[lane] = 0;
  }

  // The union, empty as [0, 0).
  void bounds(int64_t* first, int64_t* last) const {
    *first = INT64_MAX;
    *last = 0;
    for (int lane = 0; lane < kTile; ++lane) {
      if (begin[lane] >= end[lane]) continue;
      *first = smaller(*first, begin[lane]);
      *last = larger(*last, end[lane]);
    }
    if (*last == 0) *first = 0;
  }

  void clip(int64_t first, int64_t last) {
    for (int lane = 0; lane < kTile; ++lane) {
      begin[lane] = larger(begin[lane], first);
      end[lane] = smaller(end[lane], last);
    }
  }
};

// What rows [row, row + count) see; the other lanes see nothing.
inline void visible_ranges(const Pattern& pattern, int64_t row, int64_t count, LaneRanges* slots,
                           LaneRanges* locals) {
  slots->clear();
  locals->clear();
  Chunk chunk{0, 0, 0, 0, 0};
  for (int64_t lane = 0; lane < count; ++lane) {
    const int64_t t = row + lane;
    if (lane == 0 || t >= chunk.end) chunk = chunk_of(pattern, t);
    slots->begin[lane] = chunk.slot_begin;
    slots->end[lane] = chunk.slot_end;
    locals->begin[lane] = chunk.local_begin;
    locals->end[lane] = pattern.causal ? t + 1 : chunk.end;
  }
}

// Neighbouring vectors of lanes that go through the keys [begin, end) of a tile together. Every
// lane sees all of [full_begin, full_end); for the other keys the lanes are masked.
struct Group {
  int vector;
  int width;
  int begin, end;
  int full_begin, full_end;
};

// The ranges of one key tile, relative to its first key.
template <class Math>
struct TileMask {
  using Acc = typename Math::Acc;
  using Vec = typename Math::Vec;
  static constexpr int kSize = Vec::size();
  static constexpr int kVectors = kTile / kSize;

  Acc begin[kTile];
  Acc end[kTile];
  Group groups[kVectors];
  int count = 0;
  int64_t keys;

  TileMask(const LaneRanges& ranges, int64_t first_key, int64_t key_count) : keys(key_count) {
    int low[kTile];
    int high[kTile];
    for (int lane = 0; lane < kTile; ++lane) {
      low[lane] = static_cast<int>(larger(0, smaller(ranges.begin[lane] - first_key, keys)));
      high[lane] = static_cast<int>(larger(low[lane], smaller(ranges.end[lane] - first_key, keys)));
      begin[lane] = static_cast<Acc>(low[lane]);
      end[lane] = static_cast<Acc>(high[lane]);
    }
    int visible = 0;  // keys of the lanes in the open group, for the price of joining it
    for (int v = 0; v < kVectors; ++v) {
      Group group{v, 1, kTile, 0, 0, kTile};
      for (int lane = v * kSize; lane < (v + 1) * kSize; ++lane) {
        group.full_begin = group.full_begin > low[lane] ? group.full_begin : low[lane];
        group.full_end = group.full_end < high[lane] ? group.full_end : high[lane];
        if (low[lane] == high[lane]) continue;
        group.begin = group.begin < low[lane] ? group.begin : low[lane];
        group.end = group.end > high[lane] ? group.end : high[lane];
      }
      if (group.begin >= group.end) continue;
      // Whole operands: a key that no lane sees is masked like any other.
      group.begin = group.begin / Math::kDepth * Math::kDepth;
      group.end = (group.end + Math::kDepth - 1) / Math::kDepth * Math::kDepth;
      const int length = group.end - group.begin;
      if (count > 0) {
        Group& open = groups[count - 1];
        const int first = open.begin < group.begin ? open.begin : group.begin;
        const int last = open.end > group.end ? open.end : group.end;
        // A wider block loads less per product: worth up to a quarter more keys.
        if (open.vector + open.width == v && open.width < kMaxWidth &&
            4 * (last - first) * (open.width + 1) <= 5 * (visible + length)) {
          open.begin = first;
          open.end = last;
          open.full_begin = open.full_begin > group.full_begin ? open.full_begin : group.full_begin;
          open.full_end = open.full_end < group.full_end ? open.full_end : group.full_end;
          ++open.width;
          visible += length;
          continue;
        }
      }
      groups[count++] = group;
      visible = length;
    }
  }

  // All ones in the lanes of vector v that see the key.
  Vec sees(int v, int key) const {
    const Vec k(static_cast<Acc>(key));
    return (Vec::loadu(begin + v * kSize) <= k) & (k < Vec::loadu(end + v * kSize));
  }
  bool lane_sees(int lane, int key) const {
    return begin[lane] <= static_cast<Acc>(key) && static_cast<Acc>(key) < end[lane];
  }
};

}  // namespace
}  // namespace winnow::CPU_CAPABILITY
