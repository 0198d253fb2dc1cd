// One read of the logits. A block is loaded twice, the second time from the first-level cache: once
// for its maximum, then for the sums of exp(t) and t exp(t) relative to the slice's running
// maximum, while the block after the next is prefetched. The two largest logits are looked for only
// in blocks whose maximum exceeds the second largest so far, about 2 ln(blocks) of them. Per
// vector: 9 vector additions, 7 multiplications, 5 integer operations; no copy of a float row.
#include "unmasking/logit_stats_simd.h"

#include <cmath>

#include "common/dispatch_simd.h"
#include "unmasking/logit_block.h"

namespace winnow::CPU_CAPABILITY {
namespace {

// Lane sums of a slice. Two chains per block and a second level per slice keep a long tail of small
// terms from being rounded away against the largest one.
struct LaneSums {
  f32x16 mass = 0.0f;
  f32x16 moment = 0.0f;
  f32x16 drawn = 0.0f;
};

// Adds a block to the sums and returns the maximum of the next one, whose memory is fetched
// meanwhile.
template <bool kDrawn>
inline float add_block(LogitBlock block, LogitBlock next, float reference, float scale,
                       float draw_scale, LaneSums& sums) {
  const f32x16 top = reference;
  const f32x16 factor = scale;
  const f32x16 draw_factor = draw_scale;
  LaneSums chain[2];
  f32x16 next_top[2] = {kNoLogit, kNoLogit};
  const auto add = [&](int64_t v, LaneSums& into) __attribute__((always_inline)) {
    const f32x16 x = load_lanes(block.data + v * kLanes);
    const f32x16 t = scaled_exponent(x, top, factor);
    // Nothing for what is suppressed, infinitely low or padding: a certain row has entropy 0.
    const f32x16 e = select(t > f32x16(kLowestExponent), exp_scaled(t), f32x16(0.0f));
    into.mass = into.mass + e;
    into.moment = fma_lanes(t, e, into.moment);
    if (kDrawn) into.drawn = into.drawn + exp_scaled(scaled_exponent(x, top, draw_factor));
  };
  const auto look = [&](int64_t v, f32x16& into) __attribute__((always_inline)) {
    into = max_lanes(load_lanes(next.data + v * kLanes), into);
  };
  const int64_t both = block.vectors < next.vectors ? block.vectors : next.vectors;
  int64_t v = 0;
  for (; v + 2 <= both; v += 2) {
    look(v, next_top[0]);
    look(v + 1, next_top[1]);
    add(v, chain[0]);
    add(v + 1, chain[1]);
  }
  for (int64_t w = v; w < next.vectors; ++w) look(w, next_top[0]);
  for (; v < block.vectors; ++v) add(v, chain[v % 2]);
  sums.mass = sums.mass + (chain[0].mass + chain[1].mass);
  sums.moment = sums.moment + (chain[0].moment + chain[1].moment);
  if (kDrawn) sums.drawn = sums.drawn + (chain[0].drawn + chain[1].drawn);
  return max_lane(max_lanes(next_top[0], next_top[1]));
}

struct TopTwo {
  float first = kNoLogit;
  float second = kNoLogit;
};

inline void insert(TopTwo& top, float x) {
  if (x > top.first) {
    top.second = top.first;
    top.first = x;
  } else if (x > top.second) {
    top.second = x;
  }
}

inline TopTwo block_top_two(LogitBlock block) {
  f32x16 first = kNoLogit;
  f32x16 second = kNoLogit;
  for (int64_t v = 0; v < block.vectors; ++v) {
    const f32x16 x = load_lanes(block.data + v * kLanes);
    second = max_lanes(min_lanes(x, first), second);
    first = max_lanes(x, first);
  }
  alignas(64) float firsts[kLanes];
  alignas(64) float seconds[kLanes];
  store_lanes(firsts, first);
  store_lanes(seconds, second);
  TopTwo top;
  for (int i = 0; i < kLanes; ++i) {
    insert(top, firsts[i]);
    insert(top, seconds[i]);
  }
  return top;
}

inline int64_t find(LogitBlock block, float value) {
  int64_t v = 0;
  while (v + 1 < block.vectors && !any(load_lanes(block.data + v * kLanes) == f32x16(value))) ++v;
  int64_t i = v * kLanes;
  while (block.data[i] != value) ++i;
  return i;
}

// A run of slices, block after block: while the sums of one block are taken, the next one is read.
template <typename T, bool kDrawn>
class SliceScan {
 public:
  SliceScan(const LogitRows& rows, const int64_t* active, int64_t unit, int64_t units,
            double temperature, double draw_temperature, LogitSliceSums* results)
      : rows_(rows),
        active_(active),
        slices_(logit_slices(rows.vocab)),
        first_unit_(unit),
        end_unit_(unit + units),
        temperature_(temperature),
        draw_temperature_(draw_temperature),
        scale_(exponent_scale(temperature)),
        draw_scale_(exponent_scale(draw_temperature)),
        results_(results) {}

  void run() {
    int64_t unit = first_unit_;
    int64_t begin = unit % slices_ * kLogitSlice;
    LogitBlock block = load(unit, begin);
    float block_top = block_max(block);
    while (unit < end_unit_) {
      int64_t next_unit = unit;
      int64_t next_begin = begin + kLogitBlock;
      if (next_begin >= slice_end(rows_, unit % slices_)) {
        ++next_unit;
        next_begin = next_unit % slices_ * kLogitSlice;
      }
      const LogitBlock next =
          next_unit < end_unit_ ? load(next_unit, next_begin) : LogitBlock{block.data, 0};
      block_top = add(block, block_top, begin, next);
      if (next_unit != unit) {
        finish(results_[unit - first_unit_]);
        if (next_unit % slices_ == 0) row_top_ = TopTwo();
      }
      unit = next_unit;
      begin = next_begin;
      block = next;
    }
  }

 private:
  LogitBlock load(int64_t unit, int64_t begin) {
    turn_ ^= 1;
    return load_block<T>(rows_, active_[unit / slices_], begin, block_length(rows_, begin),
                         buffer_[turn_]);
  }

  // Returns the maximum of `next`.
  float add(LogitBlock block, float block_top, int64_t begin, LogitBlock next) {
    if (block_top > row_top_.second) {
      const TopTwo two = block_top_two(block);
      if (block_top > top_.first) argmax_ = begin + find(block, block_top);
      TopTwo* const tops[] = {&top_, &row_top_};
      for (TopTwo* top : tops) {
        insert(*top, two.first);
        insert(*top, two.second);
      }
    }
    if (block_top > reference_) {
      if (reference_ > kNoLogit) move_reference(block_top);
      reference_ = block_top;
    }
    if (reference_ == kNoLogit) {  // nothing to sum yet
      nan_ = nan_ || any_nan(block);
      return block_max(next);
    }
    return add_block<kDrawn>(block, next, reference_, scale_, draw_scale_, sums_);
  }

  void move_reference(float to) {
    const double shift = (static_cast<double>(reference_) - to) / temperature_ / kLn2;
    const auto factor = static_cast<float>(std::exp2(shift));
    const double exponent = shift < -126.0 ? -126.0 : shift;
    sums_.moment = (sums_.moment + sums_.mass * static_cast<float>(exponent / kUnit)) * factor;
    sums_.mass = sums_.mass * factor;
    if (!kDrawn) return;
    const double draw_shift = shift * (temperature_ / draw_temperature_);
    sums_.drawn = sums_.drawn * static_cast<float>(std::exp2(draw_shift));
  }

  void finish(LogitSliceSums& result) {
    result.reference = reference_;
    result.first = top_.first;
    result.second = top_.second;
    result.argmax = argmax_;
    result.mass = sum_lanes(sums_.mass);
    result.moment =
        nan_ ? std::numeric_limits<double>::quiet_NaN() : sum_lanes(sums_.moment) * kUnit * kLn2;
    result.drawn_mass = kDrawn ? static_cast<double>(sum_lanes(sums_.drawn)) : result.mass;
    sums_ = LaneSums();
    top_ = TopTwo();
    argmax_ = -1;
    reference_ = kNoLogit;
    nan_ = false;
  }

  const LogitRows& rows_;
  const int64_t* active_;
  const int64_t slices_;
  const int64_t first_unit_;
  const int64_t end_unit_;
  const double temperature_;
  const double draw_temperature_;
  const float scale_;
  const float draw_scale_;
  LogitSliceSums* results_;

  alignas(64) float buffer_[2][kLogitBlock];
  int turn_ = 0;
  TopTwo row_top_;  // of the row's slices in this run, which prunes the search for the two largest
  LaneSums sums_;   // of the slice, as the rest
  TopTwo top_;
  int64_t argmax_ = -1;
  float reference_ = kNoLogit;
  bool nan_ = false;
};

typedef double Quad64 __attribute__((vector_size(32)));

// Doubles: a tail that single precision would round away must keep its share.
inline double sum_wide(f32x16 weights) {
  alignas(64) float w[kLanes];
  store_lanes(w, weights);
  Quad64 sum = __builtin_convertvector(quad(w, 0), Quad64);
  for (int q = 1; q < 4; ++q) sum += __builtin_convertvector(quad(w, q), Quad64);
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

template <typename T>
int64_t draw(const LogitRows& rows, int64_t row, int64_t slice, float reference, double temperature,
             double uniform, const Truncation& kept) {
  const float scale = exponent_scale(temperature);
  constexpr int64_t kBlocks = kLogitSlice / kLogitBlock;
  alignas(64) float buffer[kLogitBlock];
  const int64_t start = slice * kLogitSlice;
  const int64_t end = slice_end(rows, slice);
  double masses[kBlocks] = {};
  double total = 0.0;
  const auto weights = [&](const LogitBlock& block, int64_t begin,
                           int64_t v) __attribute__((always_inline)) {
    const i32x16 index = lane_index() + static_cast<int32_t>(begin + v * kLanes);
    return kept_weights(load_lanes(block.data + v * kLanes), index, reference, scale, kept).mass;
  };
  for (int64_t begin = start, b = 0; begin < end; begin += kLogitBlock, ++b) {
    const LogitBlock block = load_block<T>(rows, row, begin, block_length(rows, begin), buffer);
    Quad64 sum[4] = {};
    for (int64_t v = 0; v < block.vectors; ++v) {
      alignas(64) float w[kLanes];
      store_lanes(w, weights(block, begin, v));
      for (int q = 0; q < 4; ++q) sum[q] += __builtin_convertvector(quad(w, q), Quad64);
    }
    const Quad64 all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    masses[b] = (all[0] + all[2]) + (all[1] + all[3]);
    total += masses[b];
  }
  // The blocks, then the vectors, then the lanes until the cumulated weight exceeds the target.
  // Rounding may leave it just short: the last token that has any weight is then the one.
  double left = uniform * total;
  int64_t last_block = 0;
  int64_t b = 0;
  for (; b < kBlocks; ++b) {
    if (masses[b] > 0.0) {
      last_block = b;
      if (left < masses[b]) break;
      left -= masses[b];
    }
  }
  if (b == kBlocks) {
    b = last_block;
    left = masses[b];
  }
  const int64_t begin = start + b * kLogitBlock;
  const LogitBlock block = load_block<T>(rows, row, begin, block_length(rows, begin), buffer);
  int64_t token = -1;
  for (int64_t v = 0; v < block.vectors; ++v) {
    const f32x16 weight = weights(block, begin, v);
    const double mass = sum_wide(weight);
    if (!(mass > 0.0)) continue;
    alignas(64) float w[kLanes];
    store_lanes(w, weight);
    if (left >= mass) {
      left -= mass;
      for (int i = 0; i < kLanes; ++i) {
        if (w[i] > 0.0f) token = begin + v * kLanes + i;
      }
      continue;
    }
    for (int i = 0; i < kLanes; ++i) {
      if (!(w[i] > 0.0f)) continue;
      token = begin + v * kLanes + i;
      if (left < w[i]) return token;
      left -= w[i];
    }
    return token;
  }
  return token;
}

}  // namespace

void scan_logit_slices(const LogitRows& rows, const int64_t* active, int64_t unit, int64_t units,
                       double temperature, double draw_temperature, LogitSliceSums* sums) {
  dispatch_logits(rows.type, [&](auto zero) {
    using T = decltype(zero);
    if (draw_temperature == temperature) {
      SliceScan<T, false>(rows, active, unit, units, temperature, temperature, sums).run();
    } else {
      SliceScan<T, true>(rows, active, unit, units, temperature, draw_temperature, sums).run();
    }
  });
}

void draw_in_logit_slice(const LogitRows& rows, int64_t row, int64_t slice, float reference,
                         double temperature, double uniform, const Truncation& kept,
                         int64_t* token) {
  dispatch_logits(rows.type, [&](auto zero) {
    *token = draw<decltype(zero)>(rows, row, slice, reference, temperature, uniform, kept);
  });
}

void logit_at(const LogitRows& rows, int64_t row, int64_t index, float* logit) {
  dispatch_logits(rows.type, [&](auto zero) {
    alignas(64) float buffer[kLogitBlock];
    *logit = load_block<decltype(zero)>(rows, row, index, 1, buffer).data[0];
  });
}

void find_infinite_logit(const LogitRows& rows, int64_t row, int64_t* index) {
  *index = -1;
  dispatch_logits(rows.type, [&](auto zero) {
    alignas(64) float buffer[kLogitBlock];
    for (int64_t begin = 0; begin < rows.vocab; begin += kLogitBlock) {
      const LogitBlock block =
          load_block<decltype(zero)>(rows, row, begin, block_length(rows, begin), buffer);
      if (any_nan(block)) {
        *index = -1;
        return;
      }
      const float infinite = std::numeric_limits<float>::infinity();
      if (*index < 0 && block_max(block) == infinite) *index = begin + find(block, infinite);
    }
  });
}

}  // namespace winnow::CPU_CAPABILITY
