// A tile of query rows on its way through the keys: up to 64 rows in vector lanes, and some rows by
// themselves. Chunks of at least a vector begin a vector each, so that lanes see the same keys up
// to the causal limit; what a chunk has beyond whole vectors, such as one row of 33, would leave
// most of a vector empty and is computed with the head dimension in lanes instead. Those are the
// chunk's first rows, which see the fewest local keys.
#pragma once

#include <cstdint>

#include "attention/problem.h"

namespace winnow::CPU_CAPABILITY {
namespace {

struct KeyRange {
  int64_t begin = 0;
  int64_t end = 0;
};

// The union of ranges, empty as [0, 0).
inline KeyRange union_of(const KeyRange* ranges, int count) {
  KeyRange all{INT64_MAX, 0};
  for (int i = 0; i < count; ++i) {
    if (ranges[i].begin >= ranges[i].end) continue;
    all = {smaller(all.begin, ranges[i].begin), larger(all.end, ranges[i].end)};
  }
  return all.end == 0 ? KeyRange{} : all;
}

inline KeyRange intersection_of(const KeyRange* ranges, int count) {
  KeyRange all = ranges[0];
  for (int i = 1; i < count; ++i) {
    all = {larger(all.begin, ranges[i].begin), smaller(all.end, ranges[i].end)};
  }
  return all;
}

// Lanes whose outputs are summed in registers together; a NEON register holds no more doubles.
template <int kSize>
constexpr int kTogether = kSize < 4 ? kSize : 4;

constexpr int kSingles = 16;
constexpr int kPlaces = kTile + kSingles;  // lanes, then rows by themselves

// The keys of one source that each place of a tile sees.
template <int kSize>
struct PlaceRanges {
  KeyRange place[kPlaces];
  KeyRange some[kTile / kSize];   // keys that some lane of a vector sees
  KeyRange every[kTile / kSize];  // keys that every lane sees
  KeyRange together[kTile / kTogether<kSize>];

  void bound(int v) {
    for (int i = v * kSize / kTogether<kSize>; i < (v + 1) * kSize / kTogether<kSize>; ++i) {
      together[i] = union_of(place + i * kTogether<kSize>, kTogether<kSize>);
    }
    some[v] = union_of(place + v * kSize, kSize);
    every[v] = intersection_of(place + v * kSize, kSize);
  }

  // Lanes of vector v see the keys from `begin` to `first` + `step` times their number in it, the
  // last ones to `last`.
  void fill(int v, int64_t begin, int64_t first, int64_t step, int64_t last) {
    KeyRange* lane = place + v * kSize;
    for (int i = 0; i < kSize; ++i) lane[i] = {begin, smaller(first + step * i, last)};
    for (int i = 0; i < kSize; i += kTogether<kSize>) {
      together[(v * kSize + i) / kTogether<kSize>] = lane[i + kTogether<kSize> - 1];
    }
    some[v] = lane[kSize - 1];
    every[v] = lane[0];
  }

  // What of each lane's range lies in [begin, end).
  PlaceRanges within(int64_t begin, int64_t end) const {
    PlaceRanges clipped;
    for (int lane = 0; lane < kTile; ++lane) {
      clipped.place[lane] = {larger(place[lane].begin, begin), smaller(place[lane].end, end)};
    }
    for (int v = 0; v < kTile / kSize; ++v) clipped.bound(v);
    return clipped;
  }
};

// Places of a tile that see local keys of one chunk (or, of small chunks, any).
struct Segment {
  int first_vector, last_vector;
  int first_single, last_single;
};

template <int kSize>
class RowTile {
 public:
  static constexpr int kVectors = kTile / kSize;

  explicit RowTile(const Pattern& pattern) : pattern_(pattern) {}

  int vectors = 0;
  int singles = 0;
  int segments = 0;
  int64_t row[kPlaces];  // -1 where the lane is empty
  PlaceRanges<kSize> slots, locals;
  Segment segment[kVectors + kSingles];

  void clear() { vectors = singles = segments = 0; }
  Segment all() const { return {0, vectors, 0, singles}; }

  // Takes rows from `begin` on, before `end`, and returns the first one that found no place.
  int64_t fill(int64_t begin, int64_t end) {
    clear();
    while (begin < end) {
      const bool whole = pattern_.chunk_size >= kSize;
      const int64_t stop = whole ? smaller(end, chunk_of(pattern_, begin).end) : end;
      const Segment before{vectors, vectors, singles, singles};
      int64_t rest = stop - begin;
      int64_t leading = rest % kSize <= kSize / 2 ? rest % kSize : 0;
      while (leading > 0 && singles < kSingles) {
        add_single(begin++);
        --leading;
        --rest;
      }
      while (rest > 0 && leading == 0 && vectors < kVectors) {
        const int64_t count = smaller(rest, kSize);
        add_vector(begin, count);
        begin += count;
        rest -= count;
      }
      if (before.first_vector == vectors && before.first_single == singles) break;
      segment[segments++] = {before.first_vector, vectors, before.first_single, singles};
      if (rest > 0) break;
    }
    return begin;
  }

  // One row by itself.
  void fill_single(int64_t begin) {
    clear();
    add_single(begin);
    segment[segments++] = all();
  }

 private:
  void see(int place, int64_t r, const Chunk& chunk) {
    slots.place[place] = {chunk.slot_begin, chunk.slot_end};
    locals.place[place] = {chunk.local_begin, pattern_.causal ? r + 1 : chunk.end};
  }

  // An empty lane, whose result is dropped, sees what its neighbour does: it needs no mask.
  void add_vector(int64_t begin, int64_t count) {
    const int v = vectors++;
    const int64_t last = begin + count - 1;
    for (int i = 0; i < kSize; ++i) row[v * kSize + i] = i < count ? begin + i : -1;
    Chunk chunk = chunk_of(pattern_, begin);
    if (last < chunk.end) {
      slots.fill(v, chunk.slot_begin, chunk.slot_end, 0, chunk.slot_end);
      locals.fill(v, chunk.local_begin, pattern_.causal ? begin + 1 : chunk.end,
                  pattern_.causal ? 1 : 0, pattern_.causal ? last + 1 : chunk.end);
      return;
    }
    for (int i = 0; i < kSize; ++i) {
      const int64_t r = smaller(begin + i, last);
      if (r >= chunk.end) chunk = chunk_of(pattern_, r);
      see(v * kSize + i, r, chunk);
    }
    slots.bound(v);
    locals.bound(v);
  }

  void add_single(int64_t r) {
    row[kTile + singles] = r;
    see(kTile + singles++, r, chunk_of(pattern_, r));
  }

  const Pattern& pattern_;
};

}  // namespace
}  // namespace winnow::CPU_CAPABILITY
