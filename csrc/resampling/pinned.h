// The conditional law that a pinned particle b asks for: of all draws of a scheme those in which b
// holds a given slot, each slot being equally likely to be b's. The offspring are then those of the
// scheme, weighted by how many b has. A point of b's that is uniform over b's share of the M points
// carries this weight, so the law is the scheme's own with one of its uniforms, or one of its
// choices, decided by that point (Chopin and Singh 2015 for systematic and residual).
#pragma once

#include <cstdint>

#include "resampling/optimal.h"
#include "resampling/pairing.h"
#include "resampling/spread.h"
#include "resampling/work.h"

namespace winnow {
namespace {

typedef unsigned __int128 Wider;

// Elements of a population's uniforms that no scheme uses.
constexpr int64_t kPinnedPoint = std::numeric_limits<int64_t>::max();
constexpr int64_t kPinnedCopy = kPinnedPoint - 1;

inline uint64_t pinned_bits(const ResampleCall& call, const Population& p, int64_t element) {
  return philox_bits(call.seed, static_cast<uint64_t>(p.row), static_cast<uint64_t>(element));
}

// Uniform in [0, width).
inline Wider point_below(Wider width, uint64_t bits) {
  const Wider low = static_cast<Wider>(bits) * static_cast<uint64_t>(width);
  return static_cast<Wider>(bits) * static_cast<uint64_t>(width >> 64) + (low >> 64);
}

// The uniform whose multiply_high with `total` is `point`.
inline uint64_t bits_of_point(uint64_t point, uint64_t total) {
  return static_cast<uint64_t>(((static_cast<Wider>(point) << 64) + (total - 1)) / total);
}

// The total of the weights before particle k that lie below the threshold.
template <typename T>
uint64_t total_before(const Work<T>& work, int64_t k, uint64_t threshold) {
  const int64_t b = k / kBlock;
  uint64_t before = work.block(b).start;
  for (int64_t i = b * kBlock; i < k; ++i) {
    const uint64_t weight = work.fixed_weight(i);
    if (weight < threshold) before += weight;
  }
  return before;
}

// A pinned particle without weight survives too: it gets the least there is.
template <typename T>
void give_least_weight(const Work<T>& work) {
  const Population& p = work.population;
  const auto least = static_cast<WeightOf<T>>(1.0 / p.scale);
  if (work.weights[p.pinned] < least) work.weights[p.pinned] = least;
}

// Killing: b survives in its slot, or another slot is killed and draws b. Particle k is killed with
// probability 1 - q_k / most; `cumulative` is of the q.
template <typename T>
int64_t pinned_slot(const Work<T>& work, uint64_t most, uint64_t bits) {
  const Population& p = work.population;
  const Wider point = point_below(static_cast<Wider>(p.particles) * most, bits);
  if (point < p.total) return p.pinned;
  int64_t low = 0;
  int64_t high = p.particles - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    const Wider killed = static_cast<Wider>(middle + 1) * most - work.cumulative[middle];
    if (killed > point - p.total) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Before anything is spread.
template <typename T>
void decide_by_pinned(const Work<T>& work) {
  const ResampleCall& call = work.call;
  Population& p = work.population;
  const uint64_t weight = work.fixed_weight(p.pinned);
  const bool optimal = call.scheme == Scheme::kOptimal;
  const auto samples = static_cast<uint64_t>(optimal ? p.drawn : p.samples);
  const uint64_t total = optimal ? p.drawn_total : p.total;
  if (optimal && weight >= p.threshold) return;  // kept in any case
  const uint64_t before = total_before(work, p.pinned, optimal ? p.threshold : ~uint64_t{0});
  const Wider point =
      point_below(static_cast<Wider>(samples) * weight, pinned_bits(call, p, kPinnedPoint));
  const Wider place = static_cast<Wider>(samples) * before + point;
  switch (call.scheme) {
    case Scheme::kSystematic:
    case Scheme::kOptimal:
      p.forced = 0;
      p.forced_bits = bits_of_point(static_cast<uint64_t>(place % total), total);
      break;
    case Scheme::kStratified:
      p.forced = static_cast<int64_t>(place / total);
      p.forced_bits = bits_of_point(static_cast<uint64_t>(place % total), total);
      break;
    case Scheme::kMultinomial:
      p.forced = p.pinned;
      p.forced_bits = bits_of_point(before, total);
      break;
    case Scheme::kResidual:
    case Scheme::kSsp: {
      uint64_t rest;
      const int64_t whole = whole_offspring(make_grid(p.samples, total, 0), weight, &rest);
      p.forced_rest = point >= static_cast<Wider>(static_cast<uint64_t>(whole)) * total;
      break;
    }
    case Scheme::kKilling:
      break;  // needs the cumulative weights: pinned_slot
  }
}

inline void reverse(int64_t* first, int64_t n) {
  for (int64_t i = 0; i < n / 2; ++i) {
    const int64_t other = first[n - 1 - i];
    first[n - 1 - i] = first[i];
    first[i] = other;
  }
}

// Ascending ancestors are rotated, so that one of b's copies, any with the same probability, lies
// in slot b. Every slot then is as likely as any other to hold a given copy.
inline void rotate_to_pinned(const ResampleCall& call, const Population& p,
                             const int64_t* offspring, int64_t* ancestors) {
  int64_t at = 0;
  for (int64_t k = 0; k < p.pinned; ++k) at += offspring[k];
  at += static_cast<int64_t>(
      multiply_high(pinned_bits(call, p, kPinnedCopy), static_cast<uint64_t>(offspring[p.pinned])));
  const int64_t right = p.pinned < at ? p.pinned - at + p.samples : p.pinned - at;
  reverse(ancestors, p.samples);
  reverse(ancestors, right);
  reverse(ancestors + right, p.samples - right);
}

}  // namespace
}  // namespace winnow
