// Which keys a query row may attend: one descriptor for every attention of this family. Rows lie in
// chunks; a row sees a prefix of the slots (compressed vectors, or the vector rows of the
// interleaved layout) and a run of rows around its own chunk.
//
// Included by *_simd.cc too, hence plain pointers and internal linkage; by .cu, hence constexpr.
#pragma once

#include <cstdint>

namespace winnow {

template <typename Table>
struct PatternOf {
  int64_t rows = 0;        // query rows, which are the local keys too
  int64_t chunk_size = 1;  // the last chunk of a sequence may be short
  int64_t slots = 0;
  int64_t initial_slots = 0;
  int64_t slots_per_chunk = 0;  // slots that become visible with each further chunk
  int64_t lookback = 0;         // earlier chunks whose rows are visible
  bool causal = true;           // local keys end at the row itself, else at its chunk's end
  bool interleaved = false;     // slot m is row m * chunk_size: both gradients belong to one row
  // Several sequences one after another, or none (0): both pointers have sequences + 1 entries.
  int64_t sequences = 0;
  Table row_begin = nullptr;
  Table slot_begin = nullptr;
};
using Pattern = PatternOf<const int64_t*>;

namespace {

struct Chunk {
  int64_t begin, end;            // rows
  int64_t local_begin;           // first row that the chunk's rows see
  int64_t slot_begin, slot_end;  // slots that they see
};

constexpr int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
constexpr int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

struct Sequence {
  int64_t begin, end;            // rows
  int64_t slot_begin, slot_end;  // slots
};

// The last of `count` parts that begins at or before `place`: an empty one never is.
template <typename Table>
constexpr int64_t part_at(const Table& begins, int64_t count, int64_t place) {
  int64_t low = 0;
  int64_t high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    const int64_t begin = begins[middle];
    (begin <= place ? low : high) = middle;
  }
  return low;
}

template <typename Table>
constexpr Sequence sequence_at(const PatternOf<Table>& pattern, const Table& begins,
                               int64_t place) {
  if (pattern.sequences == 0) return {0, pattern.rows, 0, pattern.slots};
  const int64_t i = part_at(begins, pattern.sequences, place);
  return {pattern.row_begin[i], pattern.row_begin[i + 1], pattern.slot_begin[i],
          pattern.slot_begin[i + 1]};
}

template <typename Table>
constexpr Chunk chunk_of(const PatternOf<Table>& pattern, int64_t row) {
  const Sequence sequence = sequence_at(pattern, pattern.row_begin, row);
  const int64_t index = (row - sequence.begin) / pattern.chunk_size;
  const int64_t begin = sequence.begin + index * pattern.chunk_size;
  return {begin, smaller(begin + pattern.chunk_size, sequence.end),
          larger(sequence.begin, begin - pattern.lookback * pattern.chunk_size),
          sequence.slot_begin,
          smaller(sequence.slot_end,
                  sequence.slot_begin + pattern.initial_slots + index * pattern.slots_per_chunk)};
}

}  // namespace
}  // namespace winnow
