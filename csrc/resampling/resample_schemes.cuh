// The schemes on the GPU. Counting schemes find where each particle's slots end, and each slot then
// searches these ends; independent draws search the cumulative weights. Every step is one of a
// whole team: each block has a share of the particles or of the slots.
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

// Systematic and stratified: offspring and ends.
template <typename Block>
WINNOW_DEVICE void count_points(const Block& p) {
  const PointGrid grid = grid_of(p);
  const bool stratified = p.call.scheme == Scheme::kStratified;
  const Global<int64_t> ends = p.ends();
  const Global<uint64_t> offspring = p.offspring();
  p.cumulate(
      p.share(p.live), p.before, [&](int64_t k) { return p.fixed_weight(k); },
      [&](int64_t k, uint64_t weight, uint64_t behind) {
        const int64_t end = points_below(p, grid, stratified, behind + weight);
        const int64_t begin = points_below(p, grid, stratified, behind);
        ends[k] = end;
        offspring[p.slot(k)] = static_cast<uint64_t>(end - begin);
      });
  p.sync();
}

// Multinomial and killing: cumulative weights, and nobody chosen yet.
template <typename Block>
WINNOW_DEVICE void cumulate_weights(const Block& p) {
  const Global<uint64_t> cumulative = p.cumulative();
  const Global<uint64_t> offspring = p.offspring();
  p.cumulate(
      p.share(p.live), p.before, [&](int64_t k) { return p.fixed_weight(k); },
      [&](int64_t k, uint64_t weight, uint64_t behind) {
        cumulative[k] = behind + weight;
        offspring[p.slot(k)] = 0;
      });
  p.sync();
}

// Killing, with a pinned particle: who is killed in its place, or itself.
template <typename Block>
WINNOW_DEVICE int64_t killed_for_pinned(const Block& p) {
  const Global<const uint64_t> cumulative = p.cumulative();
  const auto at = [&](int64_t k) -> uint64_t { return cumulative[k]; };
  return killed_slot(p.pinned, p.live, static_cast<uint64_t>(p.scale), p.total,
                     p.drawn_bits(kPinnedPoint), at);
}

// The particle of slot j of a multinomial or killing population; `killed` by killed_for_pinned.
template <typename Block>
WINNOW_DEVICE int64_t draw_slot(const Block& p, int64_t j, int64_t killed) {
  const Global<const uint64_t> cumulative = p.cumulative();
  if (p.call.scheme == Scheme::kMultinomial) {
    return first_above<uint64_t>(cumulative, p.live, multiply_high(p.uniform_bits(j), p.total));
  }
  if (p.pinned >= 0) {  // it survives, or changes places with a slot that has drawn it
    if (j == p.pinned) return p.pinned;
    if (j == killed) j = p.pinned;
  }
  const int64_t power = (bits_as<int64_t>(p.scale) >> 52) - 1023;
  const bool stays = (p.uniform_bits(j) >> (64 - power)) < p.fixed_weight(j);
  if (stays) return j;
  return first_above<uint64_t>(cumulative, p.live,
                               multiply_high(p.uniform_bits(p.live + j), p.total));
}

// Ends of the offspring of each particle.
template <typename Block>
WINNOW_DEVICE void end_offspring(Block& p) {
  const Global<int64_t> ends = p.ends();
  const Range mine = p.share(p.live);
  const auto number = [&](int64_t k) {
    const uint64_t copies = p.offspring()[p.slot(k)];
    return copies;
  };
  const uint64_t start = p.sum_before_share(mine, number);
  p.cumulate(mine, start, number, [&](int64_t k, uint64_t copies, uint64_t behind) {
    ends[k] = static_cast<int64_t>(behind + copies);
  });
  p.sync();
}

// floor(M w) each, the rest drawn in proportion to the remainders.
template <typename Block>
WINNOW_DEVICE void count_residual(Block& p) {
  int shift = 0;
  while ((int64_t{1} << shift) < p.live) ++shift;
  const PointGrid grid = make_grid(p.count, p.total, 0);
  const Global<uint64_t> rests = p.cumulative();
  const Global<uint64_t> offspring = p.offspring();
  const Range mine = p.share(p.live);
  uint64_t whole = 0;
  uint64_t rest = 0;
  for (int64_t k = mine.begin + thread_index(); k < mine.end; k += p.kSize) {
    const Split share = split(grid, p.fixed_weight(k));
    const uint64_t gained = p.forced.rest && k == p.pinned ? 1 : 0;
    offspring[p.slot(k)] = static_cast<uint64_t>(share.whole) + gained;
    whole += static_cast<uint64_t>(share.whole) + gained;
    rest += share.rest >> shift;
  }
  const TeamSums found = p.add_up(rest, whole);
  p.cumulate(
      mine, found.before.first,
      [&](int64_t k) { return split(grid, p.fixed_weight(k)).rest >> shift; },
      [&](int64_t k, uint64_t own, uint64_t behind) { rests[k] = behind + own; });
  p.sync();
  const Range draws = p.share(p.count - static_cast<int64_t>(found.all.second));
  for (int64_t j = draws.begin + thread_index(); j < draws.end; j += p.kSize) {
    const uint64_t point = multiply_high(p.uniform_bits(j), found.all.first);
    const int64_t k = first_above<uint64_t>(rests, p.live, point);
    atomic_add(offspring + p.slot(k), uint64_t{1});
  }
  p.sync();
}

// The Srinivasan sampling process: a thread pairs a run, then runs of runs (pairing.h).
template <typename Block>
WINNOW_DEVICE void count_pairs(const Block& p) {
  const PointGrid grid = make_grid(p.count, p.total, 0);
  const Global<uint64_t> rests = p.cumulative();
  const Global<int64_t> owners = p.ends();
  const Global<uint64_t> offspring = p.offspring();
  const int64_t certain = p.forced.rest ? p.pinned : -1;
  const Range mine = p.share(p.live);
  for (int64_t k = mine.begin + thread_index(); k < mine.end; k += p.kSize) {
    const Split share = split(grid, p.fixed_weight(k));
    offspring[p.slot(k)] = static_cast<uint64_t>(share.whole);
    rests[k] = share.rest;
    owners[k] = k;
  }
  p.sync();
  int64_t entries = p.live;
  for (int64_t size = 1; entries > 1; size *= kRun) {
    // Entry g * kRun * size holds what run g leaves; `size` particles lie between entries.
    const int64_t runs = ceil_div(entries, kRun);
    for (int64_t g = p.team.member * p.kSize + thread_index(); g < runs;
         g += p.team.size * p.kSize) {
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
    p.sync();
  }
}

// What optimal.h finds.
struct Threshold {
  uint64_t least;
  int64_t kept;
  int64_t drawn;
  uint64_t drawn_total;
  Tally before;  // kept, and the total of the others, before this block's share
};

template <typename Block>
WINNOW_DEVICE void split_at_threshold(Block& p, Threshold* t) {
  uint64_t kept = 0;
  uint64_t others = 0;
  const Range mine = p.share(p.live);
  for (int64_t k = mine.begin + thread_index(); k < mine.end; k += p.kSize) {
    const uint64_t weight = p.fixed_weight(k);
    if (weight >= t->least) {
      ++kept;
    } else {
      others += weight;
    }
  }
  const TeamSums found = p.add_up(kept, others);
  t->kept = static_cast<int64_t>(found.all.first);
  t->drawn_total = found.all.second;
  t->before = found.before;
}

template <typename Block>
WINNOW_DEVICE Threshold find_threshold(Block& p) {
  Threshold t = {1, 0, 0, 0, {}};
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

// The uniform that a pinned particle which is drawn decides.
template <typename Block>
WINNOW_DEVICE void force_drawn(Block& p, const Threshold& t) {
  const Range mine = p.share(p.live);
  uint64_t light = 0;
  for (int64_t k = mine.begin + thread_index(); k < mine.end && k < p.pinned; k += p.kSize) {
    const uint64_t weight = p.fixed_weight(k);
    if (weight < t.least) light += weight;
  }
  light = p.add_up(light, 0).all.first;
  p.forced = called_force(p.call.scheme, p.pinned, t.drawn, p.fixed_weight(p.pinned), light,
                          t.drawn_total, p.drawn_bits(kPinnedPoint));
}

template <typename Block>
WINNOW_DEVICE void count_kept_and_drawn(Block& p, const Threshold& t) {
  if (p.pinned >= 0 && t.drawn > 0 && p.fixed_weight(p.pinned) < t.least) force_drawn(p, t);
  const uint64_t total = t.drawn > 0 ? t.drawn_total : 1;
  const uint64_t offset = t.drawn > 0 ? multiply_high(p.uniform_bits(0), total) : 0;
  const PointGrid grid = make_grid(t.drawn, total, offset);
  const auto slots = [&](uint64_t light, uint64_t kept) {
    return (t.drawn > 0 ? points_below(p, grid, false, light) : 0) +
           slots_of_kept(static_cast<int64_t>(kept), t.kept, t.drawn, p.count);
  };
  const Global<int64_t> ends = p.ends();
  const Global<uint64_t> offspring = p.offspring();
  const Range mine = p.share(p.live);
  uint64_t kept = t.before.first;
  uint64_t light = t.before.second;
  for (int64_t first = mine.begin; first < mine.end; first += p.kSize) {
    const int64_t k = first + thread_index();
    const uint64_t weight = k < mine.end ? p.fixed_weight(k) : 0;
    const bool keeps = k < mine.end && weight >= t.least;
    uint64_t all_light;
    uint64_t all_kept;
    const uint64_t my_light = light + p.scan(keeps ? 0 : weight, &all_light);
    const uint64_t my_kept = kept + p.scan(keeps ? 1 : 0, &all_kept);
    light += all_light;
    kept += all_kept;
    if (k >= mine.end) continue;
    const int64_t end = slots(my_light + (keeps ? 0 : weight), my_kept + (keeps ? 1 : 0));
    ends[k] = end;
    offspring[p.slot(k)] = static_cast<uint64_t>(end - slots(my_light, my_kept));
  }
  p.sync();
}

}  // namespace
}  // namespace winnow
