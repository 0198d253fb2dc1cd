// The kernels of winnow::logit_stats. A thread block holds a slice of a row in registers, each warp
// a block of the vocabulary's grid: one read of the logits gives its maximum and then the sums
// relative to it, with no barrier. Blocks merge exactly; a second kernel, a thread block per row,
// merges them and draws the token. Rows that the mask leaves out are never read. The blocks and the
// keys of their clocks are those of the CPU, so that a seed draws the same token there, up to
// rounding.
#pragma once

#include <cmath>

#include "common/device.h"
#include "common/philox.h"
#include "unmasking/logit_rows.h"
#include "unmasking/masked_tokens.cuh"

namespace winnow {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 32;
constexpr int kSlice = kThreads * kPerThread;
constexpr int kSliceBlocks = kThreads / kWarp;  // blocks of the grid in a slice
static_assert(kSlice == kSliceBlocks * kLogitBlock, "a block for each warp");

WINNOW_DEVICE float exp2_of(float x) {
  return fast_exp2(x);
}
WINNOW_DEVICE double exp2_of(double x) {
  return exp2(x);
}

// Logits and what is applied while they are loaded. Strides in elements.
template <typename T, typename Real>
struct LogitView {
  Global<const T> logits;
  int64_t stride;
  bool vectors;                   // rows may be read 16 bytes at a time, unconditional ones too
  Global<const T> unconditional;  // or null
  int64_t unconditional_stride;
  Real guidance;  // cfg_scale + 1
  Global<const int64_t> suppressed;
  int64_t given_count;       // of suppressed
  int64_t suppressed_count;  // one more where a mask token is suppressed too
  int64_t vocab;
  int64_t start;               // id of the first logit in the whole vocabulary
  int64_t shifted;             // length of sequences whose logits come one early; 0: none
  Global<const bool> mask;     // or null
  Global<const int64_t> keys;  // of the draws, or null
  MaskedTokens tokens;

  WINNOW_DEVICE int64_t source(int64_t row) const {
    return shifted > 0 && row % shifted > 0 ? row - 1 : row;
  }
  WINNOW_DEVICE int64_t key(int64_t row) const {
    if (!keys) return row;
    const int64_t own = keys[row];
    return own;
  }
  // Index within the row, or outside of it.
  WINNOW_DEVICE int64_t suppressed_at(int64_t s) const {
    if (s >= given_count) return tokens.mask_id - start;
    const int64_t id = suppressed[s];
    return id - start;
  }
  // Slices lie on the grid: the row's first logit is at this place of the first one.
  WINNOW_DEVICE int64_t offset() const { return start % kLogitBlock; }
  WINNOW_DEVICE int64_t blocks() const {
    return vocab == 0 ? 0 : ceil_div<int64_t>(offset() + vocab, kLogitBlock);
  }
};

template <typename T, typename Real>
WINNOW_DEVICE bool skips(const LogitView<T, Real>& view, int64_t row) {
  if (view.mask) {
    const bool counts = view.mask[row];
    if (!counts) return true;
  }
  return view.tokens.length > 0 && !view.tokens.contains(row);
}

// Equal logits stay as they are: infinite ones would become NaN.
template <typename Real>
WINNOW_DEVICE Real guided(Real x, Real u, Real guidance) {
  return x == u ? x : u + guidance * (x - u);
}

// One logit without suppression.
template <typename T, typename Real>
WINNOW_DEVICE Real plain_logit(const LogitView<T, Real>& view, int64_t row, int64_t i) {
  const int64_t source = view.source(row);
  const Real x = static_cast<Real>(static_cast<T>(view.logits[source * view.stride + i]));
  if (!view.unconditional) return x;
  const Real u =
      static_cast<Real>(static_cast<T>(view.unconditional[source * view.unconditional_stride + i]));
  return guided(x, u, view.guidance);
}

template <typename T, typename Real>
WINNOW_DEVICE Real logit_at(const LogitView<T, Real>& view, int64_t row, int64_t i) {
  for (int64_t s = 0; s < view.suppressed_count; ++s) {
    if (view.suppressed_at(s) == i) return -std::numeric_limits<Real>::infinity();
  }
  return plain_logit(view, row, i);
}

// A bit for every suppressed id of a slice, kSlice / 32 words. Ids outside of the vocabulary have
// none.
template <typename T, typename Real>
WINNOW_DEVICE void mark_suppressed(const LogitView<T, Real>& view, int64_t slice,
                                   Shared<uint32_t> bits) {
  if (view.suppressed_count == 0) return;
  block_sync();  // the last slice's have been read
  bits[thread_index()] = 0u;
  static_assert(kSlice == kThreads * 32, "a word for each thread");
  block_sync();
  for (int64_t s = thread_index(); s < view.suppressed_count; s += kThreads) {
    const int64_t at = view.suppressed_at(s) + view.offset() - slice * kSlice;
    if (at >= 0 && at < kSlice) atomic_or(bits + at / 32, 1u << at % 32);
  }
  block_sync();
}

template <typename T, typename Real>
WINNOW_DEVICE bool is_suppressed(const LogitView<T, Real>& view, Shared<uint32_t> bits,
                                 int64_t within) {
  if (view.suppressed_count == 0) return false;
  const uint32_t word = bits[within / 32];
  return (word >> within % 32 & 1u) != 0;
}

// Element e of a thread's share of a slice: of its warp's block, vectors of N elements, a warp
// apart.
template <int N>
WINNOW_DEVICE int64_t within_slice(int e) {
  return warp_index() * kLogitBlock + static_cast<int64_t>(e / N * kWarp + lane_index()) * N +
         e % N;
}

// The thread's share of a slice; -infinity where it is suppressed or beyond the row.
template <typename T, typename Real>
WINNOW_DEVICE void load_slice(const LogitView<T, Real>& view, int64_t row, int64_t slice,
                              Shared<uint32_t> bits, Real* x) {
  constexpr int N = 16 / sizeof(T);
  const int64_t first = slice * kSlice - view.offset();  // index of the slice's first place
  const int64_t source = view.source(row);
  const auto logits = view.logits + source * view.stride;
  const auto base = view.unconditional + source * view.unconditional_stride;
#pragma unroll
  for (int v = 0; v < kPerThread / N; ++v) {
    const int64_t at = first + within_slice<N>(v * N);
    if (view.vectors && at >= 0 && at + N <= view.vocab) {
      const Vector<T, N> loaded = load_vector<N>(logits + at);
#pragma unroll
      for (int e = 0; e < N; ++e) x[v * N + e] = static_cast<Real>(loaded.element[e]);
      if (view.unconditional) {
        const Vector<T, N> other = load_vector<N>(base + at);
#pragma unroll
        for (int e = 0; e < N; ++e) {
          x[v * N + e] = guided(x[v * N + e], static_cast<Real>(other.element[e]), view.guidance);
        }
      }
    } else {
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const bool inside = at + e >= 0 && at + e < view.vocab;
        x[v * N + e] =
            inside ? plain_logit(view, row, at + e) : -std::numeric_limits<Real>::infinity();
      }
    }
  }
  if (view.suppressed_count == 0) return;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    if (is_suppressed(view, bits, within_slice<N>(e))) {
      x[e] = -std::numeric_limits<Real>::infinity();
    }
  }
}

// The two largest of a set, and where the first one is; of equal ones the lowest index.
struct TopTwo {
  double first;
  double second;
  int64_t argmax;
  int64_t nan;
};

WINNOW_DEVICE TopTwo no_top() {
  const double none = -std::numeric_limits<double>::infinity();
  return {none, none, -1, 0};
}

WINNOW_DEVICE TopTwo merge_tops(const TopTwo& a, const TopTwo& b) {
  const bool a_wins =
      a.first > b.first ||
      (a.first == b.first && (b.argmax < 0 || (a.argmax >= 0 && a.argmax < b.argmax)));
  const TopTwo& winner = a_wins ? a : b;
  const TopTwo& other = a_wins ? b : a;
  return {winner.first, other.first > winner.second ? other.first : winner.second, winner.argmax,
          a.nan | b.nan};
}

// Sums over t = (x - reference) / temperature, in nats.
struct Sums {
  double mass;    // of exp(t)
  double moment;  // of t exp(t)
  double drawn;   // of exp(t) at the temperature of the draw
};

WINNOW_DEVICE Sums add_sums(const Sums& a, const Sums& b) {
  return {a.mass + b.mass, a.moment + b.moment, a.drawn + b.drawn};
}

// What is kept of a slice or of a block; the sums are relative to top.first.
struct SliceSums {
  TopTwo top;
  Sums sums;
};

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// Finite and not 0, so that 0 stays 0 and infinity infinite.
template <typename Real>
WINNOW_DEVICE Real exponent_scale(double temperature) {
  const double scale = kLog2e / temperature;
  const double largest = std::numeric_limits<Real>::max();
  const double smallest = std::numeric_limits<Real>::min();
  return static_cast<Real>(scale < smallest ? smallest : scale < largest ? scale : largest);
}

// The sums of every block; `stride` apart for the next row. argmax is an id of the whole
// vocabulary.
template <typename T, typename Real>
WINNOW_KERNEL(kThreads)
scan_blocks(LogitView<T, Real> view, double temperature, double draw_temperature,
            Global<SliceSums> blocks, int64_t stride) {
  WINNOW_SHARED(uint32_t, bits, kThreads);
  const int64_t row = block_index();
  const int64_t slice = block_index_y();
  if (skips(view, row)) return;
  constexpr int N = 16 / sizeof(T);
  mark_suppressed(view, slice, Shared<uint32_t>(bits));
  Real x[kPerThread];
  load_slice(view, row, slice, Shared<uint32_t>(bits), x);

  const Real none = -std::numeric_limits<Real>::infinity();
  Real first = none;
  Real second = none;
  int at = -1;
  bool nan = false;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    nan = nan || x[e] != x[e];
    if (x[e] > first) {
      second = first;
      first = x[e];
      at = e;
    } else if (x[e] > second) {
      second = x[e];
    }
  }
  const int64_t slice_id = view.start - view.offset() + slice * kSlice;
  TopTwo top = {first, second, at < 0 ? -1 : slice_id + within_slice<N>(at), nan};
  top = warp_reduce(top, merge_tops);

  Real mass = Real(0);
  Real moment = Real(0);
  Real drawn = Real(0);
  const Real reference = static_cast<Real>(top.first);
  if (reference != none && reference != -none) {
    const Real scale = exponent_scale<Real>(temperature);
    const Real draw_scale = exponent_scale<Real>(draw_temperature);
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      const Real t = x[e] == reference ? Real(0) : (x[e] - reference) * scale;
      const Real weight = exp2_of(t);
      mass += weight;
      if (weight > Real(0)) moment = fma(t, weight, moment);
      if (draw_temperature != temperature) {
        drawn += exp2_of(x[e] == reference ? Real(0) : (x[e] - reference) * draw_scale);
      }
    }
    if (draw_temperature == temperature) drawn = mass;
  }
  Sums sums = warp_reduce(Sums{mass, moment, drawn}, add_sums);
  // Rounded as they travel between parts of a vocabulary: merged or whole, the bits are the same.
  sums = {static_cast<Real>(sums.mass), static_cast<Real>(sums.moment) * kLn2,
          static_cast<Real>(sums.drawn)};
  const int64_t block = slice * kSliceBlocks + warp_index();
  if (lane_index() == 0 && block < view.blocks()) {
    blocks[row * stride + block] = SliceSums{top, sums};
  }
}

// One row's distribution; the sums are relative to top.first.
struct Distribution {
  TopTwo top;
  double mass;
  double moment;
};

// Every thread of the block gets it.
WINNOW_DEVICE Distribution merge_row(Global<const SliceSums> slices, int64_t count,
                                     double temperature, Shared<TopTwo> top_scratch,
                                     Shared<Sums> sum_scratch) {
  TopTwo top = no_top();
  for (int64_t s = thread_index(); s < count; s += kThreads) {
    const SliceSums slice = slices[s];
    top = merge_tops(top, slice.top);
  }
  top = block_reduce<kThreads>(top, top_scratch, merge_tops);
  Sums sums = {0.0, 0.0, 0.0};
  for (int64_t s = thread_index(); s < count; s += kThreads) {
    const SliceSums slice = slices[s];
    const double shift = (slice.top.first - top.first) / temperature;
    const double weight = exp(shift);
    if (!(weight > 0.0)) continue;
    sums.mass += weight * slice.sums.mass;
    sums.moment += weight * (slice.sums.moment + shift * slice.sums.mass);
  }
  sums = block_reduce<kThreads>(sums, sum_scratch, add_sums);
  return {top, sums.mass, sums.moment};
}

}  // namespace
}  // namespace winnow
