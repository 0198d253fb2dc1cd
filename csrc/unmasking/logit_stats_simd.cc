// One read of the logits. A block is loaded twice, the second time from the first-level cache: once
// for its maximum, then for the sums of exp(t) and t exp(t) relative to it, while the next block is
// read. The two largest logits are looked for only in blocks whose maximum exceeds the second
// largest so far, about 2 ln(blocks) of them. Per vector: 9 vector additions, 7 multiplications, 3
// integer operations; no copy of a float row.
#include "unmasking/logit_stats_simd.h"

#include "unmasking/logit_block.h"

namespace winnow::CPU_CAPABILITY {
namespace {

// Lane sums of a block: 32 terms each in two chains, so that a long tail of small terms is not
// rounded away against the largest one.
struct LaneSums {
  f32x16 mass = 0.0f;
  f32x16 moment = 0.0f;
  f32x16 drawn = 0.0f;
};

// Sums a block and returns the maximum of the next one, whose memory is fetched meanwhile.
template <bool kDrawn>
inline float add_block(LogitBlock block, LogitBlock next, float reference, float scale,
                       float draw_scale, LogitBlockSums& sums) {
  const f32x16 top = reference;
  const f32x16 factor = scale;
  const f32x16 draw_factor = draw_scale;
  LaneSums chain[2];
  f32x16 next_top[2] = {kNoLogit, kNoLogit};
  const auto add = [&](int64_t v, LaneSums& into) __attribute__((always_inline)) {
    const f32x16 x = load_lanes(block.data + v * kLanes);
    const f32x16 t = scaled_exponent(x, top, factor);
    const f32x16 e = exp_scaled(t);
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
  sums.mass = sum_lanes(chain[0].mass + chain[1].mass);
  sums.moment = sum_lanes(chain[0].moment + chain[1].moment);
  sums.drawn = kDrawn ? sum_lanes(chain[0].drawn + chain[1].drawn) : sums.mass;
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

// A run of blocks: while the sums of one are taken, the next one is read.
template <typename T, bool kDrawn>
class BlockScan {
 public:
  BlockScan(const LogitRows& rows, const int64_t* active, double temperature,
            double draw_temperature)
      : rows_(rows),
        active_(active),
        blocks_(logit_blocks(rows.start, rows.vocab)),
        scale_(exponent_scale(temperature)),
        draw_scale_(exponent_scale(draw_temperature)) {}

  void run(int64_t unit, int64_t units, LogitBlockSums* results) {
    const int64_t end = unit + units;
    LogitBlock block = load(unit);
    float top = block_max(block);
    for (; unit < end; ++unit) {
      if (unit % blocks_ == 0) row_top_ = TopTwo();
      const LogitBlock next = unit + 1 < end ? load(unit + 1) : LogitBlock{block.data, 0};
      top = add(block, top, next, *results++);
      block = next;
    }
  }

 private:
  LogitBlock load(int64_t unit) {
    turn_ ^= 1;
    return load_block<T>(rows_, active_[unit / blocks_], unit % blocks_, buffer_[turn_]);
  }

  // Returns the maximum of `next`.
  float add(LogitBlock block, float top, LogitBlock next, LogitBlockSums& sums) {
    sums = {top, kNoLogit, -1.0f, 0.0f, 0.0f, 0.0f};
    if (top > row_top_.second) {
      const TopTwo two = block_top_two(block);
      if (top > row_top_.first) sums.at = static_cast<float>(find(block, top));
      sums.second = two.second;
      insert(row_top_, two.first);
      insert(row_top_, two.second);
    }
    const float infinite = std::numeric_limits<float>::infinity();
    if (top == kNoLogit || top == infinite) {  // no differences to sum
      if (any_nan(block)) sums.moment = std::numeric_limits<float>::quiet_NaN();
      return block_max(next);
    }
    return add_block<kDrawn>(block, next, top, scale_, draw_scale_, sums);
  }

  const LogitRows& rows_;
  const int64_t* active_;
  const int64_t blocks_;
  const float scale_;
  const float draw_scale_;
  alignas(64) float buffer_[2][kLogitBlock];
  int turn_ = 0;
  TopTwo row_top_;  // of the row's blocks in this run
};

inline double sum_wide(f32x16 weights) {
  alignas(64) float w[kLanes];
  store_lanes(w, weights);
  Quad64 sum = __builtin_convertvector(quad(w, 0), Quad64);
  for (int q = 1; q < 4; ++q) sum += __builtin_convertvector(quad(w, q), Quad64);
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

template <typename T>
int64_t draw(const LogitRows& rows, int64_t row, int64_t index, float reference, double temperature,
             double uniform, const Truncation& kept) {
  const float scale = exponent_scale(temperature);
  alignas(64) float buffer[kLogitBlock];
  const int64_t begin = block_begin(rows, index);
  const LogitBlock block = load_block<T>(rows, row, index, buffer);
  const auto weights = [&](int64_t v) __attribute__((always_inline)) {
    return kept_weights(load_lanes(block.data + v * kLanes), vocabulary_index(begin, v), reference,
                        scale, kept)
        .mass;
  };
  WideSum sum;
  for (int64_t v = 0; v < block.vectors; ++v) {
    alignas(64) float w[kLanes];
    store_lanes(w, weights(v));
    sum.add(w);
  }
  // The vectors, then the lanes until the cumulated weight exceeds the target. Rounding may leave
  // it just short: the last token that has any weight is then the one.
  double left = uniform * sum.total();
  int64_t token = -1;
  for (int64_t v = 0; v < block.vectors; ++v) {
    const f32x16 weight = weights(v);
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

void scan_logit_blocks(const LogitRows& rows, const int64_t* active, int64_t unit, int64_t units,
                       double temperature, double draw_temperature, LogitBlockSums* sums) {
  dispatch_logits(rows.type, [&](auto zero) {
    using T = decltype(zero);
    if (draw_temperature == temperature) {
      BlockScan<T, false>(rows, active, temperature, temperature).run(unit, units, sums);
    } else {
      BlockScan<T, true>(rows, active, temperature, draw_temperature).run(unit, units, sums);
    }
  });
}

void draw_in_logit_block(const LogitRows& rows, int64_t row, int64_t block, float reference,
                         double temperature, double uniform, const Truncation& kept,
                         int64_t* token) {
  dispatch_logits(rows.type, [&](auto zero) {
    *token = draw<decltype(zero)>(rows, row, block, reference, temperature, uniform, kept);
  });
}

void copy_logits(const LogitRows& rows, int64_t row, int64_t begin, int64_t n, float* logits) {
  dispatch_logits(rows.type, [&](auto zero) {
    alignas(64) float buffer[kLogitBlock];
    const LogitBlock block = load_logits<decltype(zero)>(rows, row, begin, n, buffer);
    for (int64_t i = 0; i < n; ++i) logits[i] = block.data[i];
  });
}

}  // namespace winnow::CPU_CAPABILITY
