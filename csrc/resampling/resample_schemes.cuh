// The schemes on the GPU. Counting schemes find where each particle's slots end, and each slot then
// searches these ends; independent draws search the cumulative weights. residual, ssp and optimal
// need several passes over a population, which one block makes.
#pragma once

#include "resampling/resample_population.cuh"

namespace winnow {
namespace {

// The first of n ascending numbers that exceeds `value`; n where none does.
template <typename Number>
WINNOW_DEVICE int64_t first_above(Global<const Number> sorted, int64_t n, Number value) {
  int64_t low = 0;
  int64_t high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    const Number at = sorted[middle];
    if (at > value) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Points of the grid below a cumulative weight.
template <typename Block>
WINNOW_DEVICE int64_t points_below(const Block& p, const PointGrid& grid, bool stratified,
                                   uint64_t cumulative) {
  const Split place = split(grid, cumulative);
  uint64_t offset = grid.offset;
  if (stratified && place.whole < static_cast<int64_t>(grid.samples)) {
    offset = multiply_high(p.uniform_bits(place.whole), grid.total);
  }
  return place.whole + (offset < place.rest ? 1 : 0);
}

template <typename Block>
WINNOW_DEVICE PointGrid grid_of(const Block& p) {
  const bool systematic = p.call.scheme == Scheme::kSystematic;
  return make_grid(p.count, p.total, systematic ? multiply_high(p.uniform_bits(0), p.total) : 0);
}

// Systematic and stratified: offspring and ends of part b, whose weights begin behind `before`.
template <typename Block>
WINNOW_DEVICE void count_part(const Block& p, int64_t b, uint64_t before) {
  const PointGrid grid = grid_of(p);
  const bool stratified = p.call.scheme == Scheme::kStratified;
  const Global<int64_t> ends = p.ends();
  const Global<uint64_t> offspring = p.offspring();
  p.each_cumulative(b * kBlock, p.part_end(b), before,
                    [&](int64_t k, uint64_t weight, uint64_t mine) {
                      const int64_t end = points_below(p, grid, stratified, mine + weight);
                      const int64_t begin = points_below(p, grid, stratified, mine);
                      ends[k] = end;
                      offspring[p.slot(k)] = static_cast<uint64_t>(end - begin);
                    });
}

// Multinomial and killing: cumulative weights of part b, and nobody chosen yet.
template <typename Block>
WINNOW_DEVICE void cumulate_part(const Block& p, int64_t b, uint64_t before) {
  const Global<uint64_t> cumulative = p.cumulative();
  const Global<uint64_t> offspring = p.offspring();
  p.each_cumulative(b * kBlock, p.part_end(b), before,
                    [&](int64_t k, uint64_t weight, uint64_t mine) {
                      cumulative[k] = mine + weight;
                      offspring[p.slot(k)] = 0;
                    });
}

// The particle of slot j of a multinomial or killing population.
template <typename Block>
WINNOW_DEVICE int64_t draw_slot(const Block& p, int64_t j) {
  const Global<const uint64_t> cumulative = p.cumulative();
  const uint64_t bits = p.uniform_bits(j);
  if (p.call.scheme == Scheme::kMultinomial) {
    return first_above<uint64_t>(cumulative, p.live, multiply_high(bits, p.total));
  }
  if (p.pinned >= 0) {  // it survives, or changes places with a slot that has drawn it
    const auto at = [&](int64_t k) -> uint64_t { return cumulative[k]; };
    const int64_t drawn = killed_slot(p.pinned, p.live, static_cast<uint64_t>(p.scale), p.total,
                                      p.drawn_bits(kPinnedPoint), at);
    if (j == p.pinned) return p.pinned;
    if (j == drawn) j = p.pinned;
  }
  const int64_t power = (bits_as<int64_t>(p.scale) >> 52) - 1023;
  const bool stays = (p.uniform_bits(j) >> (64 - power)) < p.fixed_weight(j);
  if (stays) return j;
  return first_above<uint64_t>(cumulative, p.live,
                               multiply_high(p.uniform_bits(p.live + j), p.total));
}

// floor(M w) each, the rest drawn in proportion to the remainders.
template <typename Block>
WINNOW_DEVICE void count_residual(const Block& p) {
  int shift = 0;
  while ((int64_t{1} << shift) < p.live) ++shift;
  const PointGrid grid = make_grid(p.count, p.total, 0);
  const Global<uint64_t> rests = p.cumulative();
  const Global<uint64_t> offspring = p.offspring();
  uint64_t whole = 0;
  uint64_t before = 0;
  for (int64_t first = 0; first < p.live; first += p.kSize) {
    const int64_t k = first + thread_index();
    Split share = {};
    if (k < p.live) share = split(grid, p.fixed_weight(k));
    whole += static_cast<uint64_t>(share.whole);
    uint64_t all;
    const uint64_t rest = share.rest >> shift;
    const uint64_t mine = before + p.sum_before(rest, &all);
    before += all;
    if (k >= p.live) continue;
    rests[k] = mine + rest;
    const bool gains = p.forced.rest && k == p.pinned;
    offspring[p.slot(k)] = static_cast<uint64_t>(share.whole) + (gains ? 1 : 0);
  }
  const int64_t drawn = p.count - static_cast<int64_t>(p.sum_of(whole)) - (p.forced.rest ? 1 : 0);
  block_sync();
  for (int64_t j = thread_index(); j < drawn; j += p.kSize) {
    const uint64_t point = multiply_high(p.uniform_bits(j), before);
    const int64_t k = first_above<uint64_t>(rests, p.live, point);
    atomic_add(offspring + p.slot(k), uint64_t{1});
  }
  block_sync();
}

// The Srinivasan sampling process: a thread pairs a run, then runs of runs (pairing.h).
template <typename Block>
WINNOW_DEVICE void count_pairs(const Block& p) {
  const PointGrid grid = make_grid(p.count, p.total, 0);
  const Global<uint64_t> rests = p.cumulative();
  const Global<int64_t> owners = p.ends();
  const Global<uint64_t> offspring = p.offspring();
  const int64_t certain = p.forced.rest ? p.pinned : -1;
  for (int64_t k = thread_index(); k < p.live; k += p.kSize) {
    const Split share = split(grid, p.fixed_weight(k));
    offspring[p.slot(k)] = static_cast<uint64_t>(share.whole);
    rests[k] = share.rest;
    owners[k] = k;
  }
  block_sync();
  int64_t entries = p.live;
  for (int64_t size = 1; entries > 1; size *= kRun) {
    // Entry g * kRun * size holds what run g leaves; `size` particles lie between entries.
    const int64_t runs = ceil_div(entries, kRun);
    for (int64_t g = thread_index(); g < runs; g += p.kSize) {
      const int64_t last = (g + 1) * kRun < entries ? (g + 1) * kRun : entries;
      const int64_t home = g * kRun * size;
      Remainder live = {rests[home], owners[home]};
      for (int64_t e = g * kRun + 1; e < last; ++e) {
        const Remainder next = {rests[e * size], owners[e * size]};
        const Pairing met = pair_up(live, next, p.uniform_bits(e * size), p.total, certain);
        live = met.left;
        if (met.completed >= 0) offspring[p.slot(met.completed)] += 1;
      }
      rests[home] = live.rest;
      owners[home] = live.owner;
    }
    entries = runs;
    block_sync();
  }
}

// What optimal.h finds.
struct Threshold {
  uint64_t least;
  int64_t kept;
  int64_t drawn;
  uint64_t drawn_total;
};

template <typename Block>
WINNOW_DEVICE void split_at_threshold(const Block& p, Threshold* t) {
  uint64_t kept = 0;
  uint64_t others = 0;
  for (int64_t k = thread_index(); k < p.live; k += p.kSize) {
    const uint64_t weight = p.fixed_weight(k);
    if (weight >= t->least) {
      ++kept;
    } else {
      others += weight;
    }
  }
  t->kept = static_cast<int64_t>(p.sum_of(kept));
  t->drawn_total = p.sum_of(others);
}

template <typename Block>
WINNOW_DEVICE Threshold find_threshold(const Block& p) {
  Threshold t = {1, 0, 0, 0};
  split_at_threshold(p, &t);
  if (t.kept <= p.count) return t;
  t.drawn_total = p.total;
  t.kept = 0;
  int64_t before = -1;
  while (t.kept != before) {
    before = t.kept;
    t.drawn = p.count - t.kept;
    const auto drawn = static_cast<uint64_t>(t.drawn);
    t.least = t.drawn > 0 ? (t.drawn_total + drawn - 1) / drawn : p.total + 1;
    split_at_threshold(p, &t);
  }
  return t;
}

template <typename Block>
WINNOW_DEVICE void count_kept_and_drawn(Block& p, const Threshold& t) {
  if (p.pinned >= 0 && t.drawn > 0 && p.fixed_weight(p.pinned) < t.least) {
    p.forced = force(p.call.scheme, p.pinned, t.drawn, p.fixed_weight(p.pinned),
                     p.total_before_pinned(t.least), t.drawn_total, p.drawn_bits(kPinnedPoint));
  }
  const uint64_t total = t.drawn > 0 ? t.drawn_total : 1;
  const uint64_t offset = t.drawn > 0 ? multiply_high(p.uniform_bits(0), total) : 0;
  const PointGrid grid = make_grid(t.drawn, total, offset);
  const auto slots = [&](uint64_t light, uint64_t kept) {
    return (t.drawn > 0 ? points_below(p, grid, false, light) : 0) +
           slots_of_kept(static_cast<int64_t>(kept), t.kept, t.drawn, p.count);
  };
  const Global<int64_t> ends = p.ends();
  const Global<uint64_t> offspring = p.offspring();
  uint64_t light = 0;
  uint64_t kept = 0;
  for (int64_t first = 0; first < p.live; first += p.kSize) {
    const int64_t k = first + thread_index();
    const uint64_t weight = k < p.live ? p.fixed_weight(k) : 0;
    const bool keeps = k < p.live && weight >= t.least;
    uint64_t all_light;
    uint64_t all_kept;
    const uint64_t my_light = light + p.sum_before(keeps ? 0 : weight, &all_light);
    const uint64_t my_kept = kept + p.sum_before(keeps ? 1 : 0, &all_kept);
    light += all_light;
    kept += all_kept;
    if (k >= p.live) continue;
    const int64_t end = slots(my_light + (keeps ? 0 : weight), my_kept + (keeps ? 1 : 0));
    ends[k] = end;
    offspring[p.slot(k)] = static_cast<uint64_t>(end - slots(my_light, my_kept));
  }
  block_sync();
}

// Ends of copies(offspring) of each particle.
template <typename Block, typename Copies>
WINNOW_DEVICE void end_copies(const Block& p, const Copies& copies) {
  const Global<int64_t> ends = p.ends();
  uint64_t before = 0;
  for (int64_t first = 0; first < p.live; first += p.kSize) {
    const int64_t k = first + thread_index();
    uint64_t number = 0;
    if (k < p.live) {
      number = p.offspring()[p.slot(k)];
      number = copies(number);
    }
    uint64_t all;
    const uint64_t mine = before + p.sum_before(number, &all);
    if (k < p.live) ends[k] = static_cast<int64_t>(mine + number);
    before += all;
  }
  block_sync();
}

// How far ascending ancestors are rotated, so that any copy of the pinned particle lies in its
// slot.
template <typename Block>
WINNOW_DEVICE int64_t rotation(const Block& p) {
  if (p.pinned < 0) return 0;
  const int64_t end = p.ends()[p.pinned];
  const uint64_t copies = p.offspring()[p.slot(p.pinned)];
  const int64_t at = end - static_cast<int64_t>(copies) +
                     static_cast<int64_t>(multiply_high(p.drawn_bits(kPinnedCopy), copies));
  return p.pinned < at ? p.pinned - at + p.count : p.pinned - at;
}

}  // namespace
}  // namespace winnow
