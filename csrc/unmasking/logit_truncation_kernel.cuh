// Top-k, top-p and min-p on the GPU, a block per row: the smallest kept logit is found digit by
// digit of its bit pattern, from counts (top-k) or masses (top-p) of the elements that share the
// digits so far. Masses are summed in fixed point, so that no order of additions shows. One read of
// the row per digit, from the cache for all but the longest rows.
#pragma once

#include "unmasking/logit_stats_kernel.cuh"

namespace winnow {
namespace {

// Logits above `threshold` are kept, and those equal to it up to vocabulary index `last_tie`.
struct KeptRange {
  double threshold;
  int64_t last_tie;
};

WINNOW_DEVICE KeptRange keep_all() {
  return {-std::numeric_limits<double>::infinity(), -1};
}

WINNOW_DEVICE bool keeps(const KeptRange& kept, double x, int64_t index) {
  return x > kept.threshold || (x == kept.threshold && index <= kept.last_tie);
}

// Ascending with the value; -0 sorts with 0.
WINNOW_DEVICE uint32_t key_of(float x) {
  if (x == 0.0f) x = 0.0f;
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
WINNOW_DEVICE uint64_t key_of(double x) {
  if (x == 0.0) x = 0.0;
  uint64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits >> 63 ? ~bits : bits | 0x8000000000000000u;
}
WINNOW_DEVICE float value_of(uint32_t key) {
  const uint32_t bits = key >> 31 ? key & 0x7fffffffu : ~key;
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
WINNOW_DEVICE double value_of(uint64_t key) {
  const uint64_t bits = key >> 63 ? key & 0x7fffffffffffffffu : ~key;
  double x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

constexpr int kDigits = 256;
constexpr double kMassUnit = 17592186044416.0;  // 2^44: a row of 2^19 ones fits 63 bits

struct Histogram {
  Shared<uint64_t> measure;  // kDigits
  Shared<uint32_t> count;    // kDigits
  Shared<uint64_t> found;    // 3
};

// Where a measure, summed from the largest element down, reaches a target.
template <typename Key>
struct Cut {
  Key key;         // the largest element at which it does
  uint64_t above;  // measure of all larger ones
  uint64_t equal;  // elements equal to it
};

template <typename Real>
class Truncator {
 public:
  using Key = decltype(key_of(Real(0)));

  WINNOW_DEVICE Truncator(const LogitView<Real>& view, int64_t row, Real reference, Real scale,
                          Shared<uint32_t> bits, const Histogram& histogram)
      : view_(view),
        row_(row),
        reference_(reference),
        scale_(scale),
        bits_(bits),
        histogram_(histogram) {}

  WINNOW_DEVICE uint64_t weight(Real x) const {
    const Real t = (x - reference_) * scale_;
    return static_cast<uint64_t>(static_cast<double>(exp2_of(t)) * kMassUnit);
  }

  // visit(x, index) for this thread's elements of every slice, -infinity aside; in step.
  template <typename Visit>
  WINNOW_DEVICE void each(const Visit& visit) const {
    for (int64_t slice = 0; slice * kSlice < view_.vocab; ++slice) {
      mark_suppressed(view_, slice, bits_);
      for (int64_t i = slice * kSlice + thread_index(); i < view_.vocab && i < (slice + 1) * kSlice;
           i += kThreads) {
        if (is_suppressed(view_, bits_, i - slice * kSlice)) continue;
        const Real x = plain_logit(view_, row_, i);
        if (x != -std::numeric_limits<Real>::infinity()) visit(x, i);
      }
    }
  }

  // Of weights, or of one for each element.
  WINNOW_DEVICE uint64_t measure(Real x, bool weighs) const { return weighs ? weight(x) : 1; }

  // All threads get it. The target must lie in (0, the measure of everything].
  WINNOW_DEVICE Cut<Key> cut(uint64_t target, bool weighs) const {
    Cut<Key> result = {0, 0, 0};
#pragma unroll 1
    for (int shift = 8 * sizeof(Key) - 8; shift >= 0; shift -= 8) {
      histogram_.measure[thread_index()] = uint64_t{0};
      histogram_.count[thread_index()] = 0u;
      static_assert(kDigits == kThreads, "a digit for each thread");
      block_sync();
      each([&](Real x, int64_t) {
        const Key key = key_of(x);
        if (shift + 8 < static_cast<int>(8 * sizeof(Key)) &&
            (key ^ result.key) >> (shift + 8) != 0) {
          return;
        }
        const int digit = static_cast<int>(key >> shift & (kDigits - 1));
        atomic_add(histogram_.measure + digit, measure(x, weighs));
        atomic_add(histogram_.count + digit, 1u);
      });
      block_sync();
      if (thread_index() == 0) {
        uint64_t above = result.above;
        int digit = kDigits - 1;
        for (; digit > 0; --digit) {
          const uint64_t here = histogram_.measure[digit];
          if (above + here >= target) break;
          above += here;
        }
        const uint32_t equal = histogram_.count[digit];
        histogram_.found[0] = static_cast<uint64_t>(digit);
        histogram_.found[1] = above;
        histogram_.found[2] = static_cast<uint64_t>(equal);
      }
      block_sync();
      const uint64_t digit = histogram_.found[0];
      result.key |= static_cast<Key>(digit) << shift;
      result.above = histogram_.found[1];
      result.equal = histogram_.found[2];
      block_sync();
    }
    return result;
  }

  // Vocabulary index of the n-th element equal to `value`.
  WINNOW_DEVICE int64_t nth_equal(Real value, uint64_t n, Shared<uint32_t> scratch) const {
    uint64_t before = 0;
    for (int64_t slice = 0; slice * kSlice < view_.vocab; ++slice) {
      mark_suppressed(view_, slice, bits_);
      const int64_t first = slice * kSlice + thread_index() * kPerThread;
      uint32_t mine = 0;
      for (int64_t i = first; i < first + kPerThread && i < view_.vocab; ++i) {
        if (is_suppressed(view_, bits_, i - slice * kSlice)) continue;
        if (plain_logit(view_, row_, i) == value) ++mine;
      }
      uint32_t all = 0;
      const uint64_t start = before + block_scan<kThreads>(mine, scratch, &all);
      if (start < n && n <= start + mine) {
        uint64_t left = n - start;
        for (int64_t i = first;; ++i) {
          if (is_suppressed(view_, bits_, i - slice * kSlice)) continue;
          if (plain_logit(view_, row_, i) == value && --left == 0) {
            histogram_.found[0] = static_cast<uint64_t>(i);
            break;
          }
        }
      }
      before += all;
      if (before >= n) break;
    }
    block_sync();
    const uint64_t index = histogram_.found[0];
    block_sync();
    return static_cast<int64_t>(index);
  }

 private:
  const LogitView<Real>& view_;
  int64_t row_;
  Real reference_;
  Real scale_;
  Shared<uint32_t> bits_;
  const Histogram& histogram_;
};

// Finds what top_k (0: all), then top_p (1: all) and `reach` below the largest logit (-infinity:
// all) keep of each row, and the sums over it, block by block, relative to the row's largest logit.
template <typename Real>
WINNOW_KERNEL(kThreads)
truncate_rows(LogitView<Real> view, double temperature, double draw_temperature, int64_t top_k,
              double top_p, double reach, Global<const SliceSums> blocks,
              Global<KeptRange> truncations, Global<Sums> kept_sums) {
  WINNOW_SHARED(uint32_t, bits, kThreads);
  WINNOW_SHARED(uint64_t, measure, kDigits);
  WINNOW_SHARED(uint32_t, equals, kDigits);
  WINNOW_SHARED(uint64_t, found, 3);
  WINNOW_SHARED(uint64_t, mass_scratch, kThreads / kWarp);
  WINNOW_SHARED(uint32_t, count_scratch, kThreads / kWarp);
  WINNOW_SHARED(TopTwo, top_scratch, kThreads / kWarp);
  WINNOW_SHARED(Sums, sum_scratch, kThreads / kWarp);
  const int64_t row = block_index();
  if (skips(view, row)) return;
  const int64_t count = view.blocks();
  const Distribution full = merge_row(blocks + row * count, count, temperature,
                                      Shared<TopTwo>(top_scratch), Shared<Sums>(sum_scratch));
  if (!is_proper(full.top)) return;  // the same for all threads

  const Real reference = static_cast<Real>(full.top.first);
  const Real scale = exponent_scale<Real>(draw_temperature);
  const Histogram histogram = {Shared<uint64_t>(measure), Shared<uint32_t>(equals),
                               Shared<uint64_t>(found)};
  const Truncator<Real> truncator(view, row, reference, scale, Shared<uint32_t>(bits), histogram);
  const auto plus = [](uint64_t a, uint64_t b) { return a + b; };
  const auto total = [&](const KeptRange& kept, bool weighs) {
    uint64_t sum = 0;
    truncator.each([&](Real x, int64_t i) {
      if (keeps(kept, x, i)) sum += truncator.measure(x, weighs);
    });
    return block_reduce<kThreads>(sum, Shared<uint64_t>(mass_scratch), plus);
  };

  KeptRange kept = keep_all();
#pragma unroll 1
  for (int step = 0; step < 2; ++step) {  // top-k counts what is kept, then top-p weighs it
    const bool weighs = step == 1;
    if (weighs ? top_p >= 1.0 : top_k == 0) continue;
    const uint64_t all = total(kept, weighs);
    auto target = static_cast<uint64_t>(top_k);
    if (weighs) {
      const double wanted = ceil(top_p * static_cast<double>(all));
      target = wanted < 1.0 ? 1 : static_cast<uint64_t>(wanted);
    } else if (target >= all) {
      continue;
    }
    const auto cut = truncator.cut(target, weighs);
    const Real threshold = value_of(cut.key);
    const uint64_t each = truncator.measure(threshold, weighs);
    const uint64_t ties = each == 0 ? cut.equal : ceil_div(target - cut.above, each);
    const int64_t last = truncator.nth_equal(threshold, ties < cut.equal ? ties : cut.equal,
                                             Shared<uint32_t>(count_scratch));
    // Of the same threshold, top-k may have kept fewer.
    if (threshold > kept.threshold || (threshold == kept.threshold && last < kept.last_tie)) {
      kept = {threshold, last};
    }
  }
  const double least = static_cast<Real>(full.top.first + reach);
  if (least > kept.threshold) kept = {least, view.vocab - 1};
  if (thread_index() == 0) truncations[row] = kept;

  for (int64_t slice = 0; slice * kSlice < view.vocab; ++slice) {
    mark_suppressed(view, slice, Shared<uint32_t>(bits));
    Real x[kPerThread];
    load_slice(view, row, slice, Shared<uint32_t>(bits), x);
    Real mass = Real(0);
    Real moment = Real(0);
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      if (!keeps(kept, x[e], slice * kSlice + within_slice<Real>(e))) continue;
      const Real t = (x[e] - reference) * scale;
      const Real weight = exp2_of(t);
      mass += weight;
      if (weight > Real(0)) moment = fma(t, weight, moment);
    }
    const Sums sums = warp_reduce(Sums{mass, moment * kLn2, mass}, add_sums);
    const int64_t block = slice * kSliceBlocks + warp_index();
    if (lane_index() == 0 && block < count) kept_sums[row * count + block] = sums;
  }
}

}  // namespace
}  // namespace winnow
