// The conditional law that a pinned particle b asks for: of all draws of a scheme those in which b
// holds a given slot, each slot being equally likely to be b's. The offspring are then those of the
// scheme, weighted by how many b has. A point of b's that is uniform over b's share of the M points
// carries this weight, so the law is the scheme's own with one of its uniforms, or one of its
// choices, decided by that point (Chopin and Singh 2015 for systematic and residual).
#pragma once

#include <cstdint>

#include "resampling/exact.h"
#include "resampling/work.h"

namespace winnow {
namespace {

inline uint64_t pinned_bits(const ResampleCall& call, const Population& p, int64_t element) {
  return philox_bits(call.seed, static_cast<uint64_t>(p.row), static_cast<uint64_t>(element));
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

// Before anything is spread.
template <typename T>
void decide_by_pinned(const Work<T>& work) {
  const Scheme scheme = work.call.scheme;
  Population& p = work.population;
  const uint64_t weight = work.fixed_weight(p.pinned);
  const bool optimal = scheme == Scheme::kOptimal;
  if (optimal && weight >= p.threshold) return;  // kept in any case
  p.forced = force(scheme, p.pinned, optimal ? p.drawn : p.samples, weight,
                   total_before(work, p.pinned, optimal ? p.threshold : ~uint64_t{0}),
                   optimal ? p.drawn_total : p.total, pinned_bits(work.call, p, kPinnedPoint));
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
