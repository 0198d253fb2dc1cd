// From cumulative fixed-point weights to offspring. The j-th of M points lies at (j + u_j) / M of
// the total T, in integers at (j T + U_j) / M with U_j = floor(u_j T); the particles up to one
// whose cumulative weight is c hold the points with j T + U_j < M c. That comparison is decided in
// double where it is far from a tie and in integers where it is not, so the counts are exact.
#pragma once

#include <cstdint>

#include "resampling/exact.h"
#include "resampling/fixed_point.h"
#include "resampling/resample_simd.h"

namespace winnow {
namespace {

// Where uniforms come from: the caller's, or Philox keyed by (seed, population, element). A pinned
// particle decides one of them.
struct Uniforms {
  const ResampleCall& call;
  int64_t row;
  Forced forced;
};

inline Uniforms uniforms_of(const ResampleCall& call, const Population& p) {
  return {call, p.row, p.forced};
}

template <typename U>
inline uint64_t bits_of_uniform(U value) {
  const double u = static_cast<double>(value);
  if (!(u > 0.0)) return 0;
  return u < 1.0 ? static_cast<uint64_t>(u * 0x1p64) : ~uint64_t{0};
}

inline uint64_t uniform_bits(const Uniforms& from, int64_t element) {
  if (element == from.forced.element) return from.forced.bits;
  const ResampleCall& call = from.call;
  if (call.uniforms == nullptr) {
    return philox_bits(call.seed, static_cast<uint64_t>(from.row), static_cast<uint64_t>(element));
  }
  const int64_t at = from.row * call.uniforms_stride + element;
  return call.uniforms_type == ElementType::kDouble
             ? bits_of_uniform(static_cast<const double*>(call.uniforms)[at])
             : bits_of_uniform(static_cast<const float*>(call.uniforms)[at]);
}

// kLanes elements, those at or beyond `limit` arbitrary.
inline void uniform_lanes(const Uniforms& from, const uint64_t* element, int64_t limit,
                          uint64_t* bits) {
  if (from.call.uniforms == nullptr) {
    for (int h = 0; h < kLanes; h += kWide) {
      const u64x8 drawn = philox_wide(from.call.seed, wide_word(static_cast<uint64_t>(from.row)),
                                      load_wide(element + h));
      std::memcpy(bits + h, &drawn, sizeof drawn);
    }
    if (from.forced.element < 0) return;
    for (int i = 0; i < kLanes; ++i) {
      if (element[i] == static_cast<uint64_t>(from.forced.element)) bits[i] = from.forced.bits;
    }
    return;
  }
  for (int i = 0; i < kLanes; ++i) {
    const auto j = static_cast<int64_t>(element[i]);
    bits[i] = j < limit ? uniform_bits(from, j) : 0;
  }
}

// Elements first, first + 1, ...
inline void uniform_run(const Uniforms& from, int64_t first, int64_t limit, uint64_t* bits) {
  uint64_t element[kLanes];
  for (int i = 0; i < kLanes; ++i) element[i] = static_cast<uint64_t>(first + i);
  uniform_lanes(from, element, limit, bits);
}

// ceil((M c - U) / T) where it is known to be `guess` or a neighbour: the remainder fits 64 bits.
inline int64_t systematic_exact(const PointGrid& grid, uint64_t cumulative, int64_t guess) {
  auto rest = static_cast<int64_t>(grid.samples * cumulative - grid.offset -
                                   static_cast<uint64_t>(guess) * grid.total);
  const auto total = static_cast<int64_t>(grid.total);
  for (; rest > 0; rest -= total) ++guess;
  for (; rest <= -total; rest += total) --guess;
  return guess;
}

inline int64_t stratified_exact(const Uniforms& from, const PointGrid& grid, uint64_t cumulative,
                                int64_t guess) {
  auto rest =
      static_cast<int64_t>(grid.samples * cumulative - static_cast<uint64_t>(guess) * grid.total);
  const auto total = static_cast<int64_t>(grid.total);
  for (; rest >= total; rest -= total) ++guess;
  for (; rest < 0; rest += total) --guess;
  if (guess >= static_cast<int64_t>(grid.samples)) return guess;
  const uint64_t u = multiply_high(uniform_bits(from, guess), grid.total);
  return guess + (u < static_cast<uint64_t>(rest) ? 1 : 0);
}

// The cumulative count at one cumulative weight, for the boundaries of blocks.
inline int64_t count_at(const Uniforms& from, const PointGrid& grid, bool stratified,
                        uint64_t cumulative) {
  const auto scaled = static_cast<unsigned __int128>(grid.samples) * cumulative;
  const auto guess = static_cast<int64_t>(scaled / grid.total);
  return stratified ? stratified_exact(from, grid, cumulative, guess)
                    : systematic_exact(grid, cumulative, guess);
}

// ceil(y), and where y is so near an integer that its rounding error may matter.
inline LongPart count_part(DoublePart y, double near, LongPart* ties) {
  const DoublePart r = nearest(y);
  const DoublePart distance = y - r;
  *ties |= (LongPart)(distance * distance <= near * near);
  return small_to_long(r) - (LongPart)(y > r);
}

inline bool any_long(LongPart mask) {
  int64_t words[kWide / kParts];
  std::memcpy(words, &mask, sizeof mask);
  int64_t found = 0;
  for (const int64_t word : words) found |= word;
  return found != 0;
}

// counts[i] for kWide cumulative weights.
inline void systematic_counts(const PointGrid& grid, const uint64_t* cumulative, int64_t* counts) {
  const f64x8 c = to_double(load_wide(cumulative));
  LongPart ties = {};
  for (int p = 0; p < kParts; ++p) {
    const LongPart count = count_part(c.part[p] * grid.ratio - grid.shift, grid.near, &ties);
    std::memcpy(counts + p * (kWide / kParts), &count, sizeof count);
  }
  if (any_long(ties)) {
    for (int l = 0; l < kWide; ++l) counts[l] = systematic_exact(grid, cumulative[l], counts[l]);
  }
}

// counts[i] for kLanes cumulative weights.
inline void stratified_counts(const Uniforms& from, const PointGrid& grid,
                              const uint64_t* cumulative, int64_t* counts) {
  double fraction[kLanes];
  uint64_t stratum[kLanes];
  for (int h = 0; h < kLanes; h += kWide) {
    const f64x8 c = to_double(load_wide(cumulative + h));
    for (int p = 0; p < kParts; ++p) {
      const int at = h + p * (kWide / kParts);
      const DoublePart y = c.part[p] * grid.ratio;
      const DoublePart whole = floor_part(y);
      const DoublePart rest = y - whole;
      const LongPart index = small_to_long(whole);
      std::memcpy(fraction + at, &rest, sizeof rest);
      std::memcpy(stratum + at, &index, sizeof index);
    }
  }
  uint64_t bits[kLanes];
  uniform_lanes(from, stratum, static_cast<int64_t>(grid.samples), bits);
  int near = 0;
  for (int l = 0; l < kLanes; ++l) {
    // Two exact halves: an unsigned 64-bit conversion is an instruction on AVX-512 only.
    const double u = static_cast<double>(static_cast<int64_t>(bits[l] >> 11)) * 0x1p-53;
    const double distance = fraction[l] - u;
    counts[l] = static_cast<int64_t>(stratum[l]) + (distance > 0.0 ? 1 : 0);
    near |= (distance < grid.near) & (distance > -grid.near);
    near |= (fraction[l] < grid.near) | (fraction[l] > 1.0 - grid.near);
  }
  if (near != 0) {
    for (int l = 0; l < kLanes; ++l) {
      counts[l] = stratified_exact(from, grid, cumulative[l], static_cast<int64_t>(stratum[l]));
    }
  }
}

// Particles first, first + 1, ... end at counts[0], counts[1], ...: their offspring, and their
// index in the slots between. Most particles have few offspring, so four slots are written without
// a question and the next particle overwrites the surplus; never beyond `limit`.
template <typename Index>
inline int64_t scatter(const int64_t* counts, int64_t n, int64_t first, int64_t previous,
                       int64_t limit, int64_t* offspring, Index* ancestors) {
  constexpr int64_t kBurst = 4;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t end = counts[i];
    const auto index = static_cast<Index>(first + i);
    if (offspring != nullptr) offspring[first + i] = end - previous;
    if (ancestors != nullptr) {
      if (previous + kBurst <= limit) {
        const Index burst[kBurst] = {index, index, index, index};
        std::memcpy(ancestors + previous, burst, sizeof burst);
        for (int64_t j = previous + kBurst; j < end; ++j) ancestors[j] = index;
      } else {
        for (int64_t j = previous; j < end; ++j) ancestors[j] = index;
      }
    }
    previous = end;
  }
  return previous;
}

constexpr int64_t kSearchPadding = 4;  // readable elements behind the cumulative weights

// The first index in [low, high] whose cumulative weight exceeds `point`; that of `high` does.
inline int64_t search(const uint64_t* cumulative, int64_t low, int64_t high, uint64_t point) {
  int64_t length = high - low;
  if (length <= kSearchPadding) {  // a guide's cell, nearly always: no branch to mispredict
    int64_t passed = 0;
    for (int64_t i = 0; i < kSearchPadding; ++i) {
      passed += (i < length) & (cumulative[low + i] <= point);
    }
    return low + passed;
  }
  while (length > 0) {
    const int64_t half = length >> 1;
    const bool right = cumulative[low + half] <= point;
    low += right ? half + 1 : 0;
    length = right ? length - half - 1 : half;
  }
  return low;
}

}  // namespace
}  // namespace winnow
