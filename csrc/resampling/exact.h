// Decisions in integers, for one particle: what makes the ancestors the same on every instruction
// set and on the GPU. constexpr, so that kernels may call it. Weights are 63-bit integers whose
// total T is below 2^60; of M points the j-th lies at (j T + U_j) / M.
#pragma once

#include <cstdint>

#include "resampling/scheme.h"

namespace winnow {

typedef unsigned __int128 Wider;

struct PointGrid {
  uint64_t samples;
  uint64_t total;
  uint64_t offset;  // systematic: the U of all points
  double ratio;     // samples / total
  double shift;     // offset / total
  double near;      // more than the rounding error of a scaled cumulative weight
};

// samples * weight = whole * total + rest. The double is wrong by little, and the remainder of a
// wrong guess fits 64 bits.
struct Split {
  int64_t whole;
  uint64_t rest;
};

struct Remainder {
  uint64_t rest;
  int64_t owner;
};

// Who is left, and who has been completed (-1: nobody).
struct Pairing {
  Remainder left;
  int64_t completed;
};

// What a pinned particle decides: the value of one uniform, or that one of its copies is due to its
// remainder.
struct Forced {
  int64_t element = -1;
  uint64_t bits = 0;
  bool rest = false;
};

namespace {

constexpr uint64_t multiply_high(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<Wider>(a) * b) >> 64);
}

constexpr double near_tie(int64_t samples) {
  return (static_cast<double>(samples) + 1.0) * 0x1p-50;
}

constexpr PointGrid make_grid(int64_t samples, uint64_t total, uint64_t offset) {
  const double inverse = 1.0 / static_cast<double>(total);
  return {static_cast<uint64_t>(samples),
          total,
          offset,
          static_cast<double>(samples) * inverse,
          static_cast<double>(offset) * inverse,
          near_tie(samples)};
}

constexpr Split split(const PointGrid& grid, uint64_t weight) {
  const auto total = static_cast<int64_t>(grid.total);
  auto whole = static_cast<int64_t>(static_cast<double>(weight) * grid.ratio);
  auto rest =
      static_cast<int64_t>(grid.samples * weight - static_cast<uint64_t>(whole) * grid.total);
  for (; rest >= total; rest -= total) ++whole;
  for (; rest < 0; rest += total) --whole;
  return {whole, static_cast<uint64_t>(rest)};
}

// ---- ssp: two remainders meet ----

// Given that the pinned particle's remainder will be completed, whether it is now. Its remainder is
// the probability of that, so each outcome counts in proportion to the remainder that it leaves.
constexpr bool completed_now(uint64_t own, uint64_t other, uint64_t bits, uint64_t total) {
  const double u = static_cast<double>(static_cast<int64_t>(bits >> 11)) * 0x1p-53;
  const auto range = static_cast<double>(2 * total - own - other);
  return u * static_cast<double>(own) * range <
         static_cast<double>(total) * static_cast<double>(total - other);
}

// Below one in sum, one takes both, with probability in proportion to its own; else one is
// completed and the other keeps what is over. `certain` is the pinned particle if it must gain,
// else -1.
constexpr Pairing pair_up(const Remainder& a, const Remainder& b, uint64_t bits, uint64_t total,
                          int64_t certain) {
  const uint64_t sum = a.rest + b.rest;
  const bool over = sum >= total;
  const uint64_t range = over ? 2 * total - sum : sum;
  const uint64_t share = over ? total - b.rest : a.rest;
  bool first = multiply_high(bits, range) < share;
  if (a.owner == certain) first = !over || completed_now(a.rest, b.rest, bits, total);
  if (b.owner == certain) first = over && !completed_now(b.rest, a.rest, bits, total);
  return {{over ? sum - total : sum, first == over ? b.owner : a.owner},
          over ? (first ? a.owner : b.owner) : -1};
}

// ---- optimal ----

// Slots of the first `before` of `kept` particles that are kept: one each where others are drawn,
// else all of the slots in turns.
constexpr int64_t slots_of_kept(int64_t before, int64_t kept, int64_t drawn, int64_t samples) {
  if (drawn > 0 || kept == 0) return before;
  const int64_t rest = samples % kept;
  return before * (samples / kept) + (before < rest ? before : rest);
}

// ---- a pinned particle ----

// Uniform in [0, width).
constexpr Wider point_below(Wider width, uint64_t bits) {
  const Wider low = static_cast<Wider>(bits) * static_cast<uint64_t>(width);
  return static_cast<Wider>(bits) * static_cast<uint64_t>(width >> 64) + (low >> 64);
}

// The uniform whose multiply_high with `total` is `point`.
constexpr uint64_t bits_of_point(uint64_t point, uint64_t total) {
  return static_cast<uint64_t>(((static_cast<Wider>(point) << 64) + (total - 1)) / total);
}

// A point that is uniform over what the particle, of this weight behind these weights, holds of the
// M points decides. (Optimal: M, weights and total are of those that are drawn.)
constexpr Forced force(Scheme scheme, int64_t pinned, int64_t samples, uint64_t weight,
                       uint64_t before, uint64_t total, uint64_t bits) {
  const auto number = static_cast<uint64_t>(samples);
  const Wider point = point_below(static_cast<Wider>(number) * weight, bits);
  const Wider place = static_cast<Wider>(number) * before + point;
  switch (scheme) {
    case Scheme::kSystematic:
    case Scheme::kOptimal:
      return {0, bits_of_point(static_cast<uint64_t>(place % total), total), false};
    case Scheme::kStratified:
      return {static_cast<int64_t>(place / total),
              bits_of_point(static_cast<uint64_t>(place % total), total), false};
    case Scheme::kMultinomial:
      return {pinned, bits_of_point(before, total), false};
    case Scheme::kResidual:
    case Scheme::kSsp: {
      const Split share = split(make_grid(samples, total, 0), weight);
      return {-1, 0, point >= static_cast<Wider>(static_cast<uint64_t>(share.whole)) * total};
    }
    case Scheme::kKilling:
      break;  // needs all weights: killed_slot
  }
  return {};
}

// Killing: b survives in its slot, or another slot is killed and draws b. Particle k is killed with
// probability 1 - q_k / most; cumulative(k) is the sum of the q up to it.
template <typename Cumulative>
constexpr int64_t killed_slot(int64_t pinned, int64_t particles, uint64_t most, uint64_t total,
                              uint64_t bits, const Cumulative& cumulative) {
  const Wider point =
      point_below(static_cast<Wider>(static_cast<uint64_t>(particles)) * most, bits);
  if (point < total) return pinned;
  int64_t low = 0;
  int64_t high = particles - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    const uint64_t alive = cumulative(middle);
    if (static_cast<Wider>(static_cast<uint64_t>(middle + 1)) * most - alive > point - total) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

}  // namespace
}  // namespace winnow
