// Which rows of logits a step of decoding is about, read where it is needed.
#pragma once

#include "common/device.h"

namespace winnow {

// The positions of a step of decoding: tokens (B, L) that equal the mask, in a window of each row.
struct MaskedTokens {
  Global<int64_t> wide;  // of the two the one that is not null
  Global<int32_t> narrow;
  int64_t stride;  // of a row of tokens
  int64_t step;    // of neighbours in it
  int64_t length;  // L; 0: every row counts
  int64_t mask_id;
  Global<const int64_t> window;  // (B, 2), or null

  WINNOW_DEVICE bool contains(int64_t row) const {
    const int64_t b = row / length;
    const int64_t l = row % length;
    if (window) {
      const int64_t start = window[2 * b];
      const int64_t end = window[2 * b + 1];
      if (l < start || l >= end) return false;
    }
    const int64_t at = b * stride + l * step;
    if (narrow) {
      const int32_t token = narrow[at];
      return token == mask_id;
    }
    const int64_t token = wide[at];
    return token == mask_id;
  }
  WINNOW_DEVICE void write(int64_t row, int64_t token) const {
    const int64_t at = row / length * stride + row % length * step;
    if (narrow) {
      narrow[at] = static_cast<int32_t>(token);
    } else {
      wide[at] = token;
    }
  }
};

}  // namespace winnow
