// Which keys a query row may attend: one descriptor for every attention of this family. Rows lie in
// chunks; a row sees a prefix of the slots (compressed vectors, or the vector rows of the
// interleaved layout) and a run of rows around its own chunk.
//
// Included by *_simd.cc too, hence plain pointers and internal linkage.
#pragma once

#include <cstdint>

namespace winnow {

struct Pattern {
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
  const int64_t* row_begin = nullptr;
  const int64_t* slot_begin = nullptr;
};

namespace {

struct Chunk {
  int64_t begin, end;            // rows
  int64_t local_begin;           // first row that the chunk's rows see
  int64_t slot_begin, slot_end;  // slots that they see
};

inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

inline Chunk chunk_of(const Pattern& pattern, int64_t row) {
  int64_t first = 0;
  int64_t last = pattern.rows;
  int64_t slot_first = 0;
  int64_t slot_last = pattern.slots;
  if (pattern.sequences > 0) {
    int64_t low = 0;  // the last sequence that begins at or before the row: an empty one never is
    int64_t high = pattern.sequences;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (pattern.row_begin[middle] <= row ? low : high) = middle;
    }
    first = pattern.row_begin[low];
    last = pattern.row_begin[low + 1];
    slot_first = pattern.slot_begin[low];
    slot_last = pattern.slot_begin[low + 1];
  }
  const int64_t index = (row - first) / pattern.chunk_size;
  Chunk chunk;
  chunk.begin = first + index * pattern.chunk_size;
  chunk.end = smaller(chunk.begin + pattern.chunk_size, last);
  chunk.local_begin = larger(first, chunk.begin - pattern.lookback * pattern.chunk_size);
  chunk.slot_begin = slot_first;
  chunk.slot_end =
      smaller(slot_last, slot_first + pattern.initial_slots + index * pattern.slots_per_chunk);
  return chunk;
}

}  // namespace
}  // namespace winnow
