// How logit_stats sees its input: rows of a vocabulary, cut into blocks that are fixed by the
// vocabulary alone, so that a result depends on neither the threads nor the batch, nor on who holds
// which part of the vocabulary.
#pragma once

#include <cstdint>

#include "common/element_type.h"

namespace winnow {

// What one loop keeps in the first-level cache (4 KiB of float), what is summed by itself, and what
// a draw first chooses from. Blocks lie on a grid over the whole vocabulary.
constexpr int64_t kLogitBlock = 1024;

// Logits and everything that is applied while they are loaded. Strides in elements.
struct LogitRows {
  const void* logits;
  int64_t stride;
  const void* unconditional;  // or null
  int64_t unconditional_stride;
  double guidance;  // cfg_scale + 1
  ElementType type;
  const int64_t* suppressed;  // ascending, within the row
  int64_t suppressed_count;
  int64_t vocab;
  int64_t start;  // index of the row's first logit in the whole vocabulary
};

// static: units with flags of their own must not share one copy.
[[maybe_unused]] static inline int64_t logit_blocks(int64_t start, int64_t vocab) {
  return vocab == 0 ? 0 : (start % kLogitBlock + vocab + kLogitBlock - 1) / kLogitBlock;
}

// Where a block begins and ends within the row. The first and the last may be short.
[[maybe_unused]] static inline int64_t block_begin(const LogitRows& rows, int64_t block) {
  return block == 0 ? 0 : block * kLogitBlock - rows.start % kLogitBlock;
}
[[maybe_unused]] static inline int64_t block_end(const LogitRows& rows, int64_t block) {
  const int64_t end = (block + 1) * kLogitBlock - rows.start % kLogitBlock;
  return end < rows.vocab ? end : rows.vocab;
}

// What is kept of one block, in floats alone: it is also what parts of a vocabulary exchange. Sums
// are over t = (x - reference) / temperature.
struct LogitBlockSums {
  float reference;  // the largest logit of the block
  float second;     // the next; -infinity where earlier blocks hold two at least as large
  float at;         // the offset of the largest; -1 where earlier blocks hold one as large
  float mass;       // sum of exp(t)
  float moment;     // sum of t exp(t) in units of 2^-23 octaves; NaN where the block holds a NaN
  float drawn;      // sum of exp(t) at the temperature of the draw
};

constexpr double kMomentUnit = 0x1p-23 * 0.6931471805599453;  // of LogitBlockSums::moment, in nats

// The part of a distribution that top-k and top-p keep: logits above `threshold`, and of those
// equal to it the first `ties`, the last one at vocabulary index `last_tie`.
struct Truncation {
  float threshold;
  int64_t ties;
  int64_t last_tie;
};

}  // namespace winnow
