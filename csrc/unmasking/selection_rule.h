// What select_positions is told, on the CPU and on the GPU.
#pragma once

#include <cstdint>

namespace winnow {

// Numbered as in torch_winnow/_unmasking/rules.py.
enum Order : int64_t { kLowestFirst, kHighestFirst, kLeftToRight, kRandom };
enum Criterion : int64_t { kBelow, kAtLeast, kEntropyBound, kConfidenceFactor, kAny };

// Keeps the lots of a random order apart from the draws of tokens under the same seed.
constexpr uint64_t kLotKey = 0x5851F42D4C957F2D;

struct Rule {
  Order order;
  Criterion criterion;
  double threshold;
  int64_t limit;  // at most that many; -1: no limit
};

}  // namespace winnow
