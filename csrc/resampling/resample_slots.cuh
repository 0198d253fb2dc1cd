// From offspring to slots on the GPU: ancestors, log weights and statistics.
#pragma once

#include "resampling/resample_schemes.cuh"

namespace winnow {
namespace {

// A population that is not resampled keeps its particles; one without any weight comes here with
// another number of samples, and then in turns.
template <typename Block>
WINNOW_DEVICE void keep_particles(const Block& p) {
  const int64_t particles = p.call.particles;
  const int64_t samples = p.call.samples;
  const Range mine = p.share(particles);
  for (int64_t k = mine.begin + thread_index(); k < mine.end; k += p.kSize) {
    p.offspring()[k] =
        static_cast<uint64_t>(samples / particles + (k < samples % particles ? 1 : 0));
  }
  const Range slots = p.share(samples);
  for (int64_t j = slots.begin + thread_index(); j < slots.end; j += p.kSize) {
    const int64_t at = p.row * samples + j;
    p.call.ancestors[at] = j < particles ? j : j % particles;
    p.call.new_log_weights.store(
        at, j < particles ? carried(p.log_weight(j)) : -std::numeric_limits<double>::infinity());
  }
}

template <typename Block>
WINNOW_DEVICE void write_slot(const Block& p, int64_t j, int64_t ancestor, double log_weight) {
  const int64_t at = p.row * p.call.samples + p.slot(j);
  p.call.ancestors[at] = p.slot(ancestor);
  p.call.new_log_weights.store(at, log_weight);
}

// The finished: in their slot, their weight divided by what the live ones' weights were divided by.
template <typename Block>
WINNOW_DEVICE void write_finished(const Block& p) {
  if (!p.call.mask) return;
  const Range mine = p.share(p.call.particles);
  for (int64_t k = mine.begin + thread_index(); k < mine.end; k += p.kSize) {
    if (p.is_live(k)) continue;
    const int64_t at = p.row * p.call.particles + k;
    const double lowered = carried(p.log_weight(k)) - p.log_z;
    p.call.ancestors[at] = k;
    p.call.offspring[at] = 1;
    // Infinite on both sides: finished and live share the mass.
    p.call.new_log_weights.store(at, lowered == lowered ? lowered : 0.0);
  }
}

template <typename Block>
WINNOW_DEVICE void report(const Block& p) {
  if (p.team.member != 0 || thread_index() != 0) return;
  p.call.log_z.store(p.row, p.log_z);
  p.call.ess.store(p.row, p.ess);
  p.call.resampled[p.row] = p.resampled ? 1 : 0;
  p.call.status[p.row] = p.status;
}

// The new log weight of particle k's copies.
template <typename Block>
WINNOW_DEVICE double log_weight_after(const Block& p, const Threshold& t, int64_t k) {
  if (p.call.scheme != Scheme::kOptimal) return 0.0;
  const auto samples = static_cast<double>(p.count);
  if (p.fixed_weight(k) < t.least) {
    return log_number(samples *
                      (static_cast<double>(t.drawn_total) / static_cast<double>(t.drawn)) /
                      static_cast<double>(p.total));
  }
  const double relative = carried(p.log_weight(p.slot(k))) - p.top;
  const double log_weight =
      (relative == relative ? relative : 0.0) + (log_number(samples) - log_number(p.sum));
  const uint64_t copies = p.offspring()[p.slot(k)];
  return copies > 1 ? log_weight - log_number(static_cast<double>(copies)) : log_weight;
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

// Slots from independent draws, which are counted.
template <typename Block>
WINNOW_DEVICE void draw_slots(const Block& p) {
  const bool pinned = p.call.scheme == Scheme::kKilling && p.pinned >= 0;
  const int64_t killed = pinned ? killed_for_pinned(p) : -1;
  const Range mine = p.share(p.count);
  for (int64_t j = mine.begin + thread_index(); j < mine.end; j += p.kSize) {
    const int64_t k = draw_slot(p, j, killed);
    atomic_add(p.offspring() + p.slot(k), uint64_t{1});
    if (!p.call.keep_slots) write_slot(p, j, k, 0.0);
  }
}

// Slots from the ends.
template <typename Block>
WINNOW_DEVICE void fill_slots(const Block& p, const Threshold& t) {
  const Global<const int64_t> ends = p.ends();
  const int64_t right = rotation(p);
  const Range mine = p.share(p.count);
  for (int64_t j = mine.begin + thread_index(); j < mine.end; j += p.kSize) {
    const int64_t ascending = j < right ? j - right + p.count : j - right;
    const int64_t k = first_above<int64_t>(ends, p.live, ascending);
    write_slot(p, j, k, log_weight_after(p, t, k));
  }
}

// Survivors stay, and what they have beyond one fills the freed slots in ascending order.
template <typename Block>
WINNOW_DEVICE void fill_freed_slots(Block& p, const Threshold& t) {
  const Global<int64_t> ends = p.ends();
  const auto copies_of = [&](int64_t k) {
    const uint64_t copies = p.offspring()[p.slot(k)];
    return copies;
  };
  const auto beyond = [&](int64_t k) {
    const uint64_t copies = copies_of(k);
    return copies > 0 ? copies - 1 : 0;
  };
  const auto freed = [&](int64_t k) { return static_cast<uint64_t>(copies_of(k) == 0 ? 1 : 0); };
  const Range mine = p.share(p.live);
  TeamSums found = {};
  if (!p.alone()) {
    Tally own = {};
    for (int64_t k = mine.begin + thread_index(); k < mine.end; k += p.kSize) {
      own.first += beyond(k);
      own.second += freed(k);
    }
    found = p.add_up(own.first, own.second);
  }
  p.cumulate(mine, found.before.first, beyond, [&](int64_t k, uint64_t number, uint64_t behind) {
    ends[k] = static_cast<int64_t>(behind + number);
  });
  p.sync();
  p.cumulate(mine, found.before.second, freed, [&](int64_t k, uint64_t one, uint64_t rank) {
    const int64_t ancestor = one == 0 ? k
                                      : first_above<int64_t>(Global<const int64_t>(ends), p.live,
                                                             static_cast<int64_t>(rank));
    write_slot(p, k, ancestor, log_weight_after(p, t, ancestor));
  });
}

}  // namespace
}  // namespace winnow
