// What stratified, multinomial, residual, killing and ssp do with sixteen small populations, eight
// at a time: lane l of every vector belongs to population l. The decisions are those of schemes.h
// and exact.h, in the same integers.
#pragma once

#include <cstdint>
#include <cstring>

#include "resampling/fixed_point.h"
#include "resampling/resample_simd.h"

namespace winnow {
namespace {

constexpr int64_t kSmallParticles = 16;

struct SmallPopulations {
  // [particle][population]
  alignas(64) float x[kSmallParticles][kLanes];
  alignas(64) float w[kSmallParticles][kLanes];
  alignas(64) int32_t counts[kSmallParticles][kLanes];
  alignas(64) int32_t chosen[kSmallParticles][kLanes];  // by each draw, -1: not drawn
  alignas(64) int32_t packed[kSmallParticles][kLanes];  // ancestor + 256 offspring
  // [population]
  alignas(64) float top[kLanes];
  alignas(64) int32_t dead[kLanes];
  alignas(64) int32_t nan[kLanes];
  alignas(64) int32_t resampled[kLanes];
  alignas(64) float ess[kLanes];
  alignas(64) float log_z[kLanes];
  alignas(64) double scale[kLanes];
  // [population][particle]
  alignas(64) float rows[kLanes * kSmallParticles + kLanes];
  alignas(64) int32_t packed_rows[kLanes * kSmallParticles];
};

// a > b for numbers of 64 bits; every instruction set compares signed ones only.
inline LongPart above(WordPart a, WordPart b) {
  const WordPart sign = WordPart{} + (uint64_t{1} << 63);
  return (LongPart)(a ^ sign) > (LongPart)(b ^ sign);
}

// split() of every lane: k weight = whole total + rest.
inline LongPart split_part(int64_t k, WordPart weight, WordPart total, WordPart* rest) {
  const auto number = static_cast<uint64_t>(k);
  const DoublePart guess =
      floor_part(to_double(weight) * static_cast<double>(k) / to_double(total));
  LongPart whole = small_to_long(guess);
  auto over = (LongPart)(weight * number - (WordPart)whole * total);
  const LongPart below = over < 0;
  over += below & (LongPart)total;
  whole += below;
  const LongPart beyond = over >= (LongPart)total;
  over -= beyond & (LongPart)total;
  whole -= beyond;
  *rest = (WordPart)over;
  return whole;
}

// Cumulative counts from offspring.
template <int kMost>
inline void store_ends(int64_t k, int h, const u64x8* offspring, SmallPopulations* s) {
  for (int p = 0; p < kParts; ++p) {
    WordPart end = {};
    for (int i = 0; i < kMost; ++i) {
      if (i >= k) break;
      end += offspring[i].part[p];
      const IntHalf narrow = __builtin_convertvector((LongPart)end, IntHalf);
      std::memcpy(s->counts[i] + h * kWide + p * (kWide / kParts), &narrow, sizeof narrow);
    }
  }
}

// ssp: remainders meet one after another, as in pair_up. All numbers are below 2^62.
template <int kMost>
inline void pair_small(const ResampleCall& call, int64_t row, int h, const u64x8* cumulative,
                       const u64x8& total, SmallPopulations* s) {
  const int64_t k = call.particles;
  const u64x8 rows = count_from(static_cast<uint64_t>(row + h * kWide));
  u64x8 offspring[kMost];
  u64x8 live = {};
  LongPart owner[kParts] = {};
  for (int i = 0; i < kMost; ++i) {
    if (i >= k) break;
    u64x8 rest;
    u64x8 range;
    u64x8 share;
    LongPart over[kParts];
    for (int p = 0; p < kParts; ++p) {
      const WordPart all = total.part[p];
      const WordPart before = i == 0 ? WordPart{} : cumulative[i - 1].part[p];
      offspring[i].part[p] =
          (WordPart)split_part(k, cumulative[i].part[p] - before, all, &rest.part[p]);
      if (i == 0) continue;
      const WordPart sum = live.part[p] + rest.part[p];
      over[p] = (LongPart)sum >= (LongPart)all;
      const auto is_over = (WordPart)over[p];
      range.part[p] = (is_over & (all + all - sum)) | (~is_over & sum);
      share.part[p] = (is_over & (all - rest.part[p])) | (~is_over & live.part[p]);
      live.part[p] = sum - (is_over & all);
    }
    if (i == 0) {
      live = rest;
      continue;
    }
    const u64x8 bits = philox_wide(call.seed, rows, wide_word(static_cast<uint64_t>(i)));
    const u64x8 point = multiply_high(bits, range);
    for (int p = 0; p < kParts; ++p) {
      const LongPart first = (LongPart)point.part[p] < (LongPart)share.part[p];
      const LongPart next = LongPart{} + i;
      const LongPart completed = (first & owner[p]) | (~first & next);
      for (int j = 0; j <= i; ++j) {
        offspring[j].part[p] -= (WordPart)((completed == j) & over[p]);
      }
      const LongPart stays = first ^ over[p];  // the one that is left is the one that lived
      owner[p] = (stays & owner[p]) | (~stays & next);
    }
  }
  store_ends<kMost>(k, h, offspring, s);
}

// The schemes of one uniform per slot: each draw counts the ends that it has passed, and each
// particle the draws that stopped there. Killing has two: whether a particle stays, and else a
// draw.
template <int kMost>
inline void draw_small(const ResampleCall& call, int64_t row, int h, const u64x8* cumulative,
                       const u64x8& total, SmallPopulations* s) {
  const int64_t k = call.particles;
  const bool stratified = call.scheme == Scheme::kStratified;
  const bool residual = call.scheme == Scheme::kResidual;
  const bool killing = call.scheme == Scheme::kKilling;
  int shift = 0;
  while ((int64_t{1} << shift) < k) ++shift;
  const u64x8 rows = count_from(static_cast<uint64_t>(row + h * kWide));
  const f64x8 scale = load_wide(s->scale + h * kWide);
  u64x8 ends[kMost];
  u64x8 offspring[kMost];
  u64x8 range = total;
  u64x8 drawn = wide_word(static_cast<uint64_t>(k));
  for (int p = 0; p < kParts; ++p) {
    WordPart before = {};
    WordPart rests = {};
    for (int i = 0; i < kMost; ++i) {
      if (i >= k) break;
      const WordPart c = cumulative[i].part[p];
      offspring[i].part[p] = WordPart{};
      ends[i].part[p] = stratified ? c * static_cast<uint64_t>(k) : c;
      if (!residual) continue;
      WordPart rest;
      offspring[i].part[p] = (WordPart)split_part(k, c - before, total.part[p], &rest);
      drawn.part[p] -= offspring[i].part[p];
      ends[i].part[p] = rests += rest >> shift;
      before = c;
    }
    if (residual) range.part[p] = rests;
  }
  for (int j = 0; j < kMost; ++j) {
    if (j >= k) break;
    const auto element = static_cast<uint64_t>(j);
    const u64x8 bits = philox_wide(call.seed, rows, wide_word(element));
    const u64x8 drawn_bits =
        killing ? philox_wide(call.seed, rows, wide_word(static_cast<uint64_t>(k) + element))
                : bits;
    const u64x8 point = multiply_high(drawn_bits, range);
    for (int p = 0; p < kParts; ++p) {
      const WordPart at = stratified ? point.part[p] + total.part[p] * element : point.part[p];
      LongPart index = {};
      for (int i = 0; i < kMost; ++i) {
        if (i >= k) break;
        index += above(ends[i].part[p], at) + 1;
      }
      index |= (LongPart)(WordPart{} + element) >= (LongPart)drawn.part[p];  // -1: not drawn
      if (killing) {
        // The largest weight is 1, in fixed point a power of two: the scale.
        const LongPart unused_bits = 64 - (((LongPart)scale.part[p] >> 52) - 1023);
        const WordPart before = j == 0 ? WordPart{} : cumulative[j - 1].part[p];
        const LongPart stays = (LongPart)(bits.part[p] >> (WordPart)unused_bits) <
                               (LongPart)(cumulative[j].part[p] - before);
        index = (stays & (LongPart)(WordPart{} + element)) | (~stays & index);
      }
      for (int i = 0; i < kMost; ++i) {
        if (i >= k) break;
        offspring[i].part[p] -= (WordPart)(index == i);
      }
      const IntHalf narrow = __builtin_convertvector(index, IntHalf);
      std::memcpy(s->chosen[j] + h * kWide + p * (kWide / kParts), &narrow, sizeof narrow);
    }
  }
  store_ends<kMost>(k, h, offspring, s);
}

}  // namespace
}  // namespace winnow
