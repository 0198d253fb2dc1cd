// Top-k and top-p without a sort: a histogram over the distance from the largest logit, in bins
// that widen with the distance, holds counts and masses; the bin in which the count or the mass is
// reached is refined bit by bit over the few logits in it. Two or three reads of the row, from a
// cache for all but the longest.
#include "unmasking/logit_truncation_simd.h"

#include <cmath>

#include "unmasking/logit_block.h"

namespace winnow::CPU_CAPABILITY {
namespace {

// 256 bins an octave, the first octave an eighth of a nat wide: a bin holds about 1% of a wide
// distribution. 16 octaves reach 8000 nats.
constexpr int kBins = 4096;
constexpr int kBinShift = 15;
constexpr double kBinsPerNat = 8.0;

struct Bin {
  double mass;
  int64_t count;
};

inline float bin_scale(double temperature) {
  const double scale = kBinsPerNat / temperature;
  const double largest = std::numeric_limits<float>::max();
  return static_cast<float>(scale < largest ? scale : largest);
}

inline i32x16 bin_of(f32x16 x, float reference, float scale) {
  const f32x16 distance = (f32x16(reference) - x) * f32x16(scale) + f32x16(1.0f);
  const i32x16 bin = (as_bits(distance) - 0x3f800000) >> kBinShift;
  return select(bin > (kBins - 1), i32x16(kBins - 1), bin);
}

WINNOW_LANES void store_ints(int32_t* p, i32x16 v) {
  for (int i = 0; i < kParts; ++i) {
    *reinterpret_cast<LooseInts*>(p + i * kLanes / kParts) = (LooseInts)v.part[i];
  }
}

// Ascending with the value; -0 sorts with 0.
inline uint32_t key_of(float x) {
  if (x == 0.0f) x = 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

inline float value_of(uint32_t key) {
  const uint32_t bits = key >> 31 ? key & 0x7fffffffu : ~key;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// One refinement: the logits of a bin and what lies above them.
struct Cut {
  uint32_t key;   // the largest at which the target is reached
  double above;   // measure of everything larger
  int64_t equal;  // logits equal to it
};

// Measure: 1 for counts, the weight for masses.
template <typename Measure>
Cut refine(const float* values, int64_t n, double above, double target, const Measure& measure) {
  uint32_t all = ~0u;
  uint32_t some = 0;
  uint32_t lowest = ~0u;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = key_of(values[i]);
    all &= key;
    some |= key;
    lowest = key < lowest ? key : lowest;
  }
  const auto measure_from = [&](uint32_t from) {
    double sum = above;
    for (int64_t i = 0; i < n; ++i) {
      if (key_of(values[i]) >= from) sum += measure(values[i]);
    }
    return sum;
  };
  const uint32_t open = all ^ some;  // the bits in which they differ
  uint32_t key = all;
  for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
    if ((open & bit) == 0) continue;
    // `all` has no bit below that is not in every key, so this compares whole prefixes.
    const uint32_t trial = (key | bit) & ~(bit - 1);
    if (measure_from(trial) >= target) key |= bit;
  }
  Cut cut = {key < lowest ? lowest : key, above, 0};
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t k = key_of(values[i]);
    if (k > cut.key) cut.above += measure(values[i]);
    cut.equal += k == cut.key;
  }
  return cut;
}

template <typename T>
class Truncator {
 public:
  Truncator(const LogitRows& rows, int64_t row, float reference, double temperature, float* scratch)
      : rows_(rows),
        row_(row),
        reference_(reference),
        temperature_(temperature),
        scale_(exponent_scale(temperature)),
        bin_scale_(bin_scale(temperature)),
        scratch_(scratch) {}

  Truncation find(int64_t top_k, double top_p, double mass) {
    fill_bins(top_k, top_p, mass);
    Truncation kept = {kNoLogit, 0, -1};
    int64_t counted = 0;
    int bin = 0;
    double above = 0.0;
    int last_bin = kBins - 1;
    double target_mass = mass;
    if (top_k > 0 && (dropped_ || top_k < counted_)) {
      for (; counted + bins_[bin].count < top_k; ++bin) {
        counted += bins_[bin].count;
        above += bins_[bin].mass;
      }
      last_bin = bin;
      const int64_t n = collect(bin);
      const Cut cut = refine(scratch_, n, static_cast<double>(counted), static_cast<double>(top_k),
                             [](float) { return 1.0; });
      kept.threshold = value_of(cut.key);
      kept.ties = top_k - static_cast<int64_t>(cut.above);
      target_mass = above + static_cast<double>(kept.ties) * weight(kept.threshold);
      for (int64_t i = 0; i < n; ++i) {
        if (key_of(scratch_[i]) > cut.key) target_mass += weight(scratch_[i]);
      }
    }
    if (top_p < 1.0) {
      target_mass *= top_p;
      above = 0.0;
      for (bin = 0; bin < last_bin && above + bins_[bin].mass < target_mass; ++bin) {
        above += bins_[bin].mass;
      }
      while (bin > 0 && bins_[bin].count == 0) above -= bins_[--bin].mass;
      const int64_t n = collect(bin);
      const Cut cut = refine(scratch_, n, above, target_mass, [&](float x) { return weight(x); });
      const float threshold = value_of(cut.key);
      if (threshold >= kept.threshold) {
        const double w = weight(threshold);
        const double missing = w > 0.0 ? (target_mass - cut.above) / w : 1.0;
        int64_t ties = 1;  // the smallest number that reaches the target
        if (missing > 1.0) {
          ties =
              missing < static_cast<double>(cut.equal) ? static_cast<int64_t>(missing) : cut.equal;
          if (static_cast<double>(ties) < missing && ties < cut.equal) ++ties;
        }
        if (threshold > kept.threshold || ties < kept.ties) kept.ties = ties;
        kept.threshold = threshold;
      }
    }
    if (kept.ties > 0) kept.last_tie = nth_equal(kept.threshold, kept.ties);
    return kept;
  }

 private:
  double weight(float x) const {
    alignas(64) float w[kLanes];
    store_lanes(w, exp_scaled(scaled_exponent(x, reference_, scale_)));
    return w[0];
  }

  // visit(block, begin) for every block of the row until it returns false.
  template <typename Visit>
  void each_block(const Visit& visit) {
    for (int64_t b = 0; b < logit_blocks(rows_.start, rows_.vocab); ++b) {
      if (!visit(load_block<T>(rows_, row_, b, buffer_), block_begin(rows_, b))) return;
    }
  }

  // Fills the bins up to the last that can matter. For top-k that is the one in which the k-th so
  // far lies. For top-p alone: all logits that are more than log(vocab / ((1 - top_p) mass)) below
  // the top have less than the share 1 - top_p together.
  void fill_bins(int64_t top_k, double top_p, double mass) {
    for (Bin& bin : bins_) bin = {0.0, 0};
    int32_t last = kBins - 1;
    if (top_k == 0) {
      const double spare = (1.0 - top_p) * mass / static_cast<double>(rows_.vocab);
      const float cutoff = reference_ + static_cast<float>(std::log(spare) * temperature_);
      alignas(64) int32_t b[kLanes];
      store_ints(b, bin_of(f32x16(cutoff), reference_, bin_scale_));
      last = spare > 0.0 && b[0] >= 0 && b[0] < last ? b[0] + 1 : last;
    }
    each_block([&](LogitBlock block, int64_t) {
      for (int64_t v = 0; v < block.vectors; ++v) {
        const f32x16 x = load_lanes(block.data + v * kLanes);
        const i32x16 bin = bin_of(x, reference_, bin_scale_);
        const i32x16 matters = (bin < (last + 1)) & (x > f32x16(kNoLogit));
        if (!any(matters)) continue;
        alignas(64) float w[kLanes];
        alignas(64) int32_t b[kLanes];
        store_lanes(w, exp_scaled(scaled_exponent(x, reference_, scale_)));
        store_ints(b, select(matters, bin, lane_index() + kBins));
        for (int i = 0; i < kLanes; ++i) {
          bins_[b[i]].mass += w[i];
          ++bins_[b[i]].count;
        }
        counted_ += kLanes;
      }
      for (int i = kBins; i < kBins + kLanes; ++i) {
        counted_ -= bins_[i].count;
        bins_[i] = {0.0, 0};
      }
      while (top_k > 0 && last > 0 && counted_ - bins_[last].count >= top_k) {
        counted_ -= bins_[last].count;
        bins_[last--] = {0.0, 0};
        dropped_ = true;
      }
      return true;
    });
  }

  // The logits of a bin, in order of the vocabulary.
  int64_t collect(int bin) {
    int64_t n = 0;
    each_block([&](LogitBlock block, int64_t) {
      for (int64_t v = 0; v < block.vectors; ++v) {
        const f32x16 x = load_lanes(block.data + v * kLanes);
        const i32x16 found = bin_of(x, reference_, bin_scale_) == i32x16(bin);
        if (!any(found)) continue;
        alignas(64) int32_t in[kLanes];
        store_ints(in, found);
        for (int i = 0; i < kLanes; ++i) {
          const float value = block.data[v * kLanes + i];
          if (in[i] != 0 && value != kNoLogit) scratch_[n++] = value;
        }
      }
      return true;
    });
    return n;
  }

  int64_t nth_equal(float value, int64_t nth) {
    int64_t index = -1;
    each_block([&](LogitBlock block, int64_t begin) {
      for (int64_t v = 0; v < block.vectors; ++v) {
        if (!any(load_lanes(block.data + v * kLanes) == f32x16(value))) continue;
        for (int i = 0; i < kLanes; ++i) {
          if (block.data[v * kLanes + i] != value) continue;
          index = begin + v * kLanes + i;
          if (--nth == 0) return false;
        }
      }
      return true;
    });
    return index;
  }

  const LogitRows& rows_;
  const int64_t row_;
  const float reference_;
  const double temperature_;
  const float scale_;
  const float bin_scale_;
  float* scratch_;
  int64_t counted_ = 0;   // logits in the bins
  bool dropped_ = false;  // whether there were others, too small for top-k
  alignas(64) float buffer_[kLogitBlock];
  // One more per lane for logits that need none: a branch would be mispredicted, and additions to
  // one bin wait for each other.
  Bin bins_[kBins + kLanes];
};

}  // namespace

void find_truncation(const LogitRows& rows, int64_t row, float reference, double temperature,
                     int64_t top_k, double top_p, double mass, float* scratch, Truncation* kept) {
  dispatch_logits(rows.type, [&](auto zero) {
    *kept = Truncator<decltype(zero)>(rows, row, reference, temperature, scratch)
                .find(top_k, top_p, mass);
  });
}

void sum_kept_blocks(const LogitRows& rows, int64_t row, float reference, double temperature,
                     const Truncation& kept, LogitBlockSums* sums) {
  const float scale = exponent_scale(temperature);
  dispatch_logits(rows.type, [&](auto zero) {
    alignas(64) float buffer[kLogitBlock];
    for (int64_t b = 0; b < logit_blocks(rows.start, rows.vocab); ++b) {
      const LogitBlock block = load_block<decltype(zero)>(rows, row, b, buffer);
      const int64_t begin = block_begin(rows, b);
      f32x16 mass = 0.0f;
      f32x16 moment = 0.0f;
      for (int64_t v = 0; v < block.vectors; ++v) {
        const KeptWeights w = kept_weights(load_lanes(block.data + v * kLanes),
                                           vocabulary_index(begin, v), reference, scale, kept);
        mass = mass + w.mass;
        moment = fma_lanes(w.exponent, w.mass, moment);
      }
      const float sum = sum_lanes(mass);
      sums[b] = {reference, kNoLogit, -1.0f, sum, sum_lanes(moment), sum};
    }
  });
}

void cross_logit_block(const LogitRows& rows, const LogitRows& previous, int64_t row, int64_t block,
                       float reference, float previous_reference, double temperature,
                       const Truncation& kept, float* cross) {
  const float scale = exponent_scale(temperature);
  dispatch_logits(rows.type, [&](auto zero) {
    using T = decltype(zero);
    alignas(64) float buffer[kLogitBlock];
    alignas(64) float previous_buffer[kLogitBlock];
    const int64_t begin = block_begin(rows, block);
    const LogitBlock now = load_block<T>(rows, row, block, buffer);
    const LogitBlock before = load_block<T>(previous, row, block, previous_buffer);
    f32x16 sum = 0.0f;
    for (int64_t v = 0; v < now.vectors; ++v) {
      const KeptWeights w = kept_weights(load_lanes(now.data + v * kLanes),
                                         vocabulary_index(begin, v), reference, scale, kept);
      const f32x16 y = load_lanes(before.data + v * kLanes);
      const f32x16 u = (y - f32x16(previous_reference)) * f32x16(scale);
      const f32x16 term = w.mass * (w.exponent - u);
      sum = sum + select(w.mass > f32x16(0.0f), term, f32x16(0.0f));
    }
    *cross = sum_lanes(sum);
  });
}

}  // namespace winnow::CPU_CAPABILITY
