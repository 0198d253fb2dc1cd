// How the rows of the backward are divided: a split owns a run of whole chunks and the slots that
// these see.
#pragma once

#include "attention/pattern.h"

namespace winnow {
namespace {

struct Split {
  int64_t row_begin, row_end;
  int64_t slot_begin, slot_end;
};

inline int64_t split_row(const Pattern& pattern, int64_t split, int64_t splits) {
  if (split == splits) return pattern.rows;
  return chunk_of(pattern, pattern.rows / splits * split + pattern.rows % splits * split / splits)
      .begin;
}

inline Split split_of(const Pattern& pattern, int64_t index, int64_t splits) {
  Split split{split_row(pattern, index, splits), split_row(pattern, index + 1, splits), 0, 0};
  if (split.row_begin < split.row_end && pattern.slots > 0) {
    const Chunk last = chunk_of(pattern, split.row_end - 1);
    split.slot_begin = chunk_of(pattern, split.row_begin).slot_begin;
    split.slot_end = larger(split.slot_begin, last.slot_end);
    if (pattern.interleaved) split.slot_end = (split.row_end - 1) / pattern.chunk_size + 1;
  }
  return split;
}

}  // namespace
}  // namespace winnow
