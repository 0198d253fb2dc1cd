// One tile of keys against one tile of query rows: which vectors of lanes see which keys, so that a
// product runs where something is visible and nowhere else.
#pragma once

#include <cstdint>

#include "attention/row_tile.h"
#include "attention/tile_product.h"

namespace winnow::CPU_CAPABILITY {
namespace {

// Keys per tile: tiles of one size, because a last one of a few keys would cost almost as much as a
// full one. Even, for operands of two keys.
inline int64_t tile_size(const KeyRange& range) {
  const int64_t keys = range.end - range.begin;
  const int64_t tiles = larger(1, (keys + kKeyTile - 1) / kKeyTile);
  return larger(2, ((keys + tiles - 1) / tiles + 1) / 2 * 2);
}

// Neighbouring vectors of lanes that go through the keys [begin, end) of a tile together. Every
// lane sees all of [full_begin, full_end); for the other keys the lanes are masked.
struct Group {
  int vector;
  int width;
  int begin, end;
  int full_begin, full_end;
};

// The groups of one key tile, and its masks. Keys are counted from the tile's first.
template <class Math>
class TileMask {
 public:
  using Acc = typename Math::Acc;
  using Vec = typename Math::Vec;
  static constexpr int kSize = Vec::size();
  static constexpr int kVectors = kTile / kSize;

  Group groups[kVectors];
  int count = 0;
  int64_t keys;

  // Of vectors [first_vector, last_vector).
  TileMask(const PlaceRanges<kSize>& ranges, int first_vector, int last_vector, int64_t first_key,
           int64_t key_count)
      : keys(key_count), ranges_(ranges), first_key_(first_key) {
    int visible = 0;  // keys of the lanes in the open group, for the price of joining it
    for (int v = first_vector; v < last_vector; ++v) {
      const KeyRange some = inside(ranges.some[v]);
      const KeyRange every = inside(ranges.every[v]);
      if (some.begin >= some.end) continue;
      // Whole operands: a key that no lane sees is masked like any other.
      constexpr int kDepth = Math::kDepth;
      const Group group{v,
                        1,
                        static_cast<int>(some.begin / kDepth * kDepth),
                        static_cast<int>((some.end + kDepth - 1) / kDepth * kDepth),
                        static_cast<int>(every.begin),
                        static_cast<int>(every.end)};
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

  // The part of a range that lies in this tile.
  KeyRange inside(const KeyRange& range) const {
    const int64_t begin = larger(0, smaller(range.begin - first_key_, keys));
    return {begin, larger(begin, smaller(range.end - first_key_, keys))};
  }

  bool lane_sees(int lane, int key) const {
    const KeyRange& sees = ranges_.place[lane];
    return sees.begin <= first_key_ + key && first_key_ + key < sees.end;
  }

  // Masks of one vector of lanes.
  class Lanes {
   public:
    Lanes(const TileMask& mask, int vector) {
      Acc begin[kSize];
      Acc end[kSize];
      for (int i = 0; i < kSize; ++i) {
        const KeyRange sees = mask.inside(mask.ranges_.place[vector * kSize + i]);
        begin[i] = static_cast<Acc>(sees.begin);
        end[i] = static_cast<Acc>(sees.end);
      }
      begin_ = Vec::loadu(begin);
      end_ = Vec::loadu(end);
    }

    // x in the lanes that see the key, else `hidden`.
    Vec where_seen(int key, const Vec& x, const Vec& hidden) const {
      return where_holds(begin_, end_, static_cast<Acc>(key), x, hidden);
    }

   private:
    Vec begin_, end_;
  };

 private:
  const PlaceRanges<kSize>& ranges_;
  const int64_t first_key_;
};

}  // namespace
}  // namespace winnow::CPU_CAPABILITY
