// What the kernels over a block table share. Lengths and blocks stay on the device and are not
// checked: what lies outside of the pages counts as no tokens.
#pragma once

#include <algorithm>
#include <optional>

#include "common/device.h"

namespace winnow {
namespace {

WINNOW_DEVICE int64_t length_of(Global<const int32_t> seq_lens, int64_t row, int64_t most) {
  const int64_t length = static_cast<int32_t>(seq_lens[row]);
  return length < 0 ? 0 : length > most ? most : length;
}

// Which keys a query sees.
struct Mask {
  bool causal;
  int64_t window;  // 0: none
  int64_t sinks;

  WINNOW_DEVICE bool sees(int64_t i, int64_t j) const {
    if (causal && j > i) return false;
    if (window == 0 || j < sinks) return true;
    return (i > j ? i - j : j - i) < window;
  }
  // Whether some position in [first, last] may see some key in [begin, end).
  WINNOW_DEVICE bool any_sees(int64_t first, int64_t last, int64_t begin, int64_t end) const {
    if (causal && begin > last) return false;
    if (window == 0 || begin < sinks) return true;
    return end - 1 > first - window && begin < last + window;
  }
};

}  // namespace
}  // namespace winnow
