// A population for a block of threads that samples from it without replacement.
#pragma once

#include "common/philox.h"
#include "resampling/numbers.cuh"

namespace winnow {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr double kNone = -std::numeric_limits<double>::infinity();
constexpr double kInfinite = std::numeric_limits<double>::infinity();

struct SampleLaunch {
  Numbers log_weights;
  int64_t stride;
  int64_t rows;
  int64_t particles;
  int64_t k;
  bool gumbel;
  Seed seed;
  bool seed_given;
  uint64_t seed_number;
  Global<double> keys;     // (rows, K)
  Global<int64_t> picked;  // (rows, k)
  Global<int64_t> indices;
  Reals inclusion;
  Reals weights;
};

struct Sum {
  WINNOW_DEVICE double operator()(double a, double b) const { return a + b; }
};
struct Larger {
  WINNOW_DEVICE double operator()(double a, double b) const { return a > b ? a : b; }
};

struct PerturbedPopulation {
  const SampleLaunch& call;
  int64_t row;
  Shared<double> scratch;
  double top;

  // NaN is no weight.
  WINNOW_DEVICE double log_weight(int64_t i) const {
    const double x = call.log_weights[row * call.stride + i];
    return x > kNone ? x : kNone;
  }
  // Relative to the largest, -inf without weight; infinite ones are all there is.
  WINNOW_DEVICE double operator()(int64_t i) const {
    const double x = log_weight(i);
    if (top == kInfinite) return x == kInfinite ? 0.0 : kNone;
    return x > kNone ? x - top : kNone;
  }
  template <typename Combine, typename Term>
  WINNOW_DEVICE double reduce(int64_t n, double start, const Combine& combine,
                              const Term& term) const {
    for (int64_t i = thread_index(); i < n; i += kThreads) start = combine(start, term(i));
    return block_reduce<kThreads>(start, scratch, combine);
  }
  template <typename Combine, typename Term>
  WINNOW_DEVICE double reduce(double start, const Combine& combine, const Term& term) const {
    return reduce(call.particles, start, combine, term);
  }
  WINNOW_DEVICE void find_top() {
    top = reduce(kNone, Larger{}, [&](int64_t i) { return log_weight(i); });
  }
  // A number in (0, 1) with 53 bits.
  WINNOW_DEVICE double open_uniform(int64_t i) const {
    const uint64_t seed = call.seed_given ? call.seed.get() : call.seed_number;
    const uint64_t bits = philox_bits(seed, static_cast<uint64_t>(row), static_cast<uint64_t>(i));
    return (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52;
  }
};

// Keys as integers of the same order, and back.
WINNOW_DEVICE uint64_t ordered(double key) {
  uint64_t bits;
  memcpy(&bits, &key, sizeof bits);
  return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}
WINNOW_DEVICE double key_of(uint64_t word) {
  const uint64_t bits = word >> 63 ? word ^ uint64_t{1} << 63 : ~word;
  double key;
  memcpy(&key, &bits, sizeof key);
  return key;
}

// The k-th largest of the keys, 0 < k <= K.
WINNOW_CALLED uint64_t kth_largest(Global<const double> keys, int64_t particles, int64_t k,
                                   Shared<uint32_t> histogram) {
  uint64_t prefix = 0;
  int64_t rank = k;
  for (int shift = 56; shift >= 0; shift -= 8) {
    histogram[thread_index()] = 0;  // kThreads bins
    block_sync();
    for (int64_t i = thread_index(); i < particles; i += kThreads) {
      const double key = keys[i];
      const uint64_t word = ordered(key);
      const bool same = shift == 56 || (word ^ prefix) >> (shift + 8) == 0;
      if (same) atomic_add(histogram + static_cast<int64_t>(word >> shift & 255), 1u);
    }
    block_sync();
    for (int bin = 255; bin >= 0; --bin) {
      const uint32_t count = histogram[bin];
      if (rank <= static_cast<int64_t>(count)) {
        prefix |= static_cast<uint64_t>(bin) << shift;
        break;
      }
      rank -= count;
    }
    block_sync();
  }
  return prefix;
}

}  // namespace
}  // namespace winnow
