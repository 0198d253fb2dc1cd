// How logit_stats sees its input: rows of a vocabulary, cut into slices that are fixed by the
// vocabulary alone, so that a result depends on neither the threads nor the batch.
#pragma once

#include <cstdint>

#include "common/element_type.h"

namespace winnow {

// A block is what one loop keeps in the first-level cache (4 KiB of float); a slice is the unit
// that threads share and that sampling first chooses from. 8 blocks a slice: fewer slices mean
// fewer logarithms per draw, more of them split one long row further.
constexpr int64_t kLogitBlock = 1024;
constexpr int64_t kLogitSlice = 8 * kLogitBlock;

// static: units with flags of their own must not share one copy.
[[maybe_unused]] static inline int64_t logit_slices(int64_t vocab) {
  return (vocab + kLogitSlice - 1) / kLogitSlice;
}

// Logits and everything that is applied while they are loaded. Strides in elements.
struct LogitRows {
  const void* logits;
  int64_t stride;
  const void* unconditional;  // or null
  int64_t unconditional_stride;
  double guidance;  // cfg_scale + 1
  ElementType type;
  const int64_t* suppressed;  // ascending
  int64_t suppressed_count;
  int64_t vocab;
};

// What is kept of one slice. Sums are over t = (x - reference) / temperature, in nats.
struct LogitSliceSums {
  float reference;  // the largest logit of the slice
  float first;      // the two largest of the slice; lower where the row's earlier slices are known
  float second;     // to hold two at least as large
  int64_t argmax;
  double mass;        // sum of exp(t)
  double moment;      // sum of t exp(t); NaN where the slice holds a NaN
  double drawn_mass;  // sum of exp(t) at the temperature of the draw
};

// The part of a distribution that top-k and top-p keep: logits above `threshold`, and of those
// equal to it the first `ties`, the last one at vocabulary index `last_tie`.
struct Truncation {
  float threshold;
  int64_t ties;
  int64_t last_tie;
};

}  // namespace winnow
