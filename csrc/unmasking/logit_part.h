// How parts of a vocabulary are exchanged: one row of floats (doubles for float64 logits) per row
// of logits. A block that a part holds whole travels as its sums; of a block that it shares with
// its neighbours it sends the logits, so that whoever merges the parts can do with it what one
// machine would have done. That makes the result the same bit for bit, wherever the vocabulary is
// cut.
#pragma once

#include "unmasking/logit_rows.h"

namespace winnow {

constexpr int64_t kSumsWords = 6;      // LogitBlockSums
constexpr int64_t kPreviousWords = 3;  // of previous_logits: reference, mass (NaN: has one), cross

// The first words of a row.
enum PartWord : int64_t {
  kDrawnIndex,   // within the part, of a token drawn from its whole blocks; -1: none
  kDrawnLogit,   // of that token
  kTargetLogit,  // of the target, -infinity where it is in another part
  kMeasured,     // 0: the mask leaves the row out
  kPartHeader
};

struct PartLayout {
  int64_t head;   // logits before the first whole block
  int64_t whole;  // blocks
  int64_t tail;   // logits after the last whole block
  bool previous;  // all of it once more for previous_logits

  constexpr int64_t sums_at() const { return kPartHeader + head; }
  constexpr int64_t tail_at() const { return sums_at() + whole * kSumsWords; }
  constexpr int64_t previous_at() const { return tail_at() + tail; }
  constexpr int64_t previous_sums_at() const { return previous_at() + head; }
  constexpr int64_t previous_tail_at() const { return previous_sums_at() + whole * kPreviousWords; }
  constexpr int64_t words() const { return previous ? previous_tail_at() + tail : previous_at(); }
};

// Of float64 logits all are sent: that path is for oracles.
constexpr PartLayout part_layout(int64_t start, int64_t vocab, bool previous, bool is_double) {
  const int64_t to_grid = (kLogitBlock - start % kLogitBlock) % kLogitBlock;
  const int64_t head = is_double || to_grid > vocab ? vocab : to_grid;
  const int64_t whole = (vocab - head) / kLogitBlock;
  return {head, whole, vocab - head - whole * kLogitBlock, previous};
}

}  // namespace winnow
