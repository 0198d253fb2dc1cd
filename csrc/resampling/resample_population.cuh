// One population on the GPU: what its particles weigh, and the decision to resample. A population
// has a team of blocks, of one mostly. Each has a share of the particles, whole parts of kBlock,
// and they meet between the steps; what a step finds of a share lies in global memory. Sums of
// weights are made part by part and added in order, all others are integers: nothing depends on the
// team.
#pragma once

#include "common/philox.h"
#include "resampling/numbers.cuh"
#include "resampling/resample_weigh.cuh"

namespace winnow {
namespace {

struct PartSums {
  double sum;
  double squares;
};

// What a member of a team tells the others.
struct Tally {
  uint64_t first;
  uint64_t second;
};

// Of two numbers per member, sums over the whole team and over the members before this one.
struct TeamSums {
  Tally all;
  Tally before;
};

struct AddTeamSums {
  WINNOW_DEVICE TeamSums operator()(const TeamSums& a, const TeamSums& b) const {
    return {{a.all.first + b.all.first, a.all.second + b.all.second},
            {a.before.first + b.before.first, a.before.second + b.before.second}};
  }
};

// A block of a population's team, and where the team meets.
struct Team {
  int64_t size;
  int64_t member;
  Global<uint32_t> meetings;
  Global<Tally> tallies;  // two turns of one per member: nobody is two meetings ahead of another
  int64_t turn_length;
};

template <int kThreads>
WINNOW_DEVICE void meet(const Team& team) {
  if constexpr (kThreads == kWarp) {  // alone
    warp_sync(kFullWarp);
  } else if (team.size > 1) {
    blocks_sync(team.meetings, team.size);
  } else {
    block_sync();
  }
}

// take(member, its tally) for every member, each by one thread; a meeting too.
template <int kThreads, typename Take>
WINNOW_DEVICE void exchange(const Team& team, int turn, const Tally& mine, const Take& take) {
  const Global<Tally> tallies = team.tallies + turn * team.turn_length;
  if (thread_index() == 0) tallies[team.member] = mine;
  meet<kThreads>(team);
  for (int64_t i = thread_index(); i < team.size; i += kThreads) {
    const Tally other = tallies[i];
    take(i, other);
  }
}

// Sums of what the threads of the whole team bring, for each of them; a meeting too.
template <int kThreads>
WINNOW_CALLED TeamSums add_up(Team team, int turn, Shared<TeamSums> scratch, Tally mine) {
  const TeamSums own = block_reduce<kThreads>(TeamSums{mine, {}}, scratch, AddTeamSums{});
  if (kThreads == kWarp || team.size == 1) {
    meet<kThreads>(team);
    return own;
  }
  TeamSums seen = {};
  exchange<kThreads>(team, turn, own.all, [&](int64_t i, const Tally& other) {
    seen = AddTeamSums{}(seen, {other, i < team.member ? other : Tally{}});
  });
  return block_reduce<kThreads>(seen, scratch, AddTeamSums{});
}

WINNOW_CALLED uint64_t called_philox_bits(uint64_t seed, uint64_t row, uint64_t element) {
  return philox_bits(seed, row, element);
}

WINNOW_CALLED Forced called_force(Scheme scheme, int64_t pinned, int64_t samples, uint64_t weight,
                                  uint64_t before, uint64_t total, uint64_t bits) {
  return force(scheme, pinned, samples, weight, before, total, bits);
}

struct Range {
  int64_t begin;
  int64_t end;
};

struct ResampleLaunch {
  Numbers log_weights;
  int64_t stride;
  int64_t rows;
  int64_t particles;
  int64_t samples;
  Global<const uint8_t> mask;  // null: all live
  int64_t mask_stride;
  bool uniforms_given;  // else drawn from the seed
  Numbers uniforms;
  int64_t uniforms_stride;
  Global<const int64_t> pinned;  // null: none
  Seed seed;
  uint64_t seed_number;  // where `seed` is none
  bool seed_given;
  Scheme scheme;
  double ess_threshold;
  bool keep_slots;
  Global<int64_t> ancestors;
  Global<uint64_t> offspring;
  Reals new_log_weights;
  Reals log_z;
  Reals ess;
  Global<uint8_t> resampled;
  Global<int32_t> status;
  // Blocks of a population, and where they meet.
  int64_t team;
  Global<uint32_t> meetings;  // one per population
  Global<Tally> tallies;      // (2, rows, team)
  // Scratch: of each population, parts, weights (padded to 16), and three numbers per particle.
  int64_t parts;
  Global<PartSums> part;
  int64_t padded;
  Reals weights;
  Global<uint64_t> cumulative;  // weights, or remainders
  Global<int64_t> ends;         // cumulative slots, or owners of remainders
  Global<int64_t> slots;        // of the live particles; null without mask
};

template <int kThreads>
struct PopulationBlock {
  static constexpr int kSize = kThreads;
  const ResampleLaunch& call;
  int64_t row;
  Team team;
  Shared<uint64_t> words;  // kThreads / 32 each
  Shared<double> doubles;
  Shared<TeamSums> sums;
  int turn = 0;       // of the tallies
  int64_t live = 0;   // particles
  int64_t count = 0;  // samples
  int64_t pinned = -1;
  int32_t status = 0;
  bool resampled = false;
  double top = 0.0;
  double sum = 0.0;
  double log_z = 0.0;
  double ess = 0.0;
  double scale = 0.0;
  uint64_t total = 0;
  uint64_t before = 0;         // total of the shares before this block's
  uint64_t before_pinned = 0;  // total of the particles before the pinned one
  Forced forced = {};

  // ---- the team ----

  WINNOW_DEVICE bool alone() const { return kThreads == kWarp || team.size == 1; }
  WINNOW_DEVICE void sync() const { meet<kThreads>(team); }

  // This block's share of n elements.
  WINNOW_DEVICE Range share(int64_t n) const {
    if (alone()) return {0, n};
    const int64_t parts = ceil_div<int64_t>(n, kBlock);
    const int64_t end = parts * (team.member + 1) / team.size * kBlock;
    return {parts * team.member / team.size * kBlock, end < n ? end : n};
  }

  WINNOW_DEVICE TeamSums add_up(uint64_t first, uint64_t second) {
    turn = 1 - turn;
    return winnow::add_up<kThreads>(team, turn, sums, Tally{first, second});
  }

  // The sum of number(k) over the shares before this block's.
  template <typename Number>
  WINNOW_DEVICE uint64_t sum_before_share(const Range& mine, const Number& number) {
    if (alone()) return 0;
    uint64_t found = 0;
    for (int64_t k = mine.begin + thread_index(); k < mine.end; k += kThreads) found += number(k);
    return add_up(found, 0).before.first;
  }

  WINNOW_DEVICE uint64_t scan(uint64_t value, uint64_t* all) const {
    return block_scan<kThreads>(value, words, all);
  }

  // take(k, number, sum of the numbers before it) for the elements of a share, by a thread each;
  // the first has `start` before it.
  template <typename Number, typename Take>
  WINNOW_DEVICE void cumulate(const Range& mine, uint64_t start, const Number& number,
                              const Take& take) const {
    for (int64_t first = mine.begin; first < mine.end; first += kThreads) {
      const int64_t k = first + thread_index();
      const uint64_t value = k < mine.end ? number(k) : 0;
      uint64_t all;
      const uint64_t behind = start + scan(value, &all);
      if (k < mine.end) take(k, value, behind);
      start += all;
    }
  }

  // ---- the population's elements ----

  WINNOW_DEVICE bool is_live(int64_t at) const {
    const uint8_t set = call.mask[row * call.mask_stride + at];
    return set != 0;
  }
  WINNOW_DEVICE int64_t slot(int64_t k) const {
    if (!call.slots) return k;
    const int64_t at = call.slots[row * call.particles + k];
    return at;
  }
  WINNOW_DEVICE double log_weight(int64_t at) const {
    return call.log_weights[row * call.stride + at];
  }
  WINNOW_DEVICE uint64_t fixed_weight(int64_t k) const {
    return static_cast<uint64_t>(call.weights[row * call.padded + k] * scale);
  }
  WINNOW_DEVICE Global<uint64_t> cumulative() const {
    return call.cumulative + row * call.particles;
  }
  WINNOW_DEVICE Global<int64_t> ends() const { return call.ends + row * call.particles; }
  WINNOW_DEVICE Global<uint64_t> offspring() const { return call.offspring + row * call.particles; }

  // ---- uniforms ----

  WINNOW_DEVICE uint64_t drawn_bits(int64_t element) const {
    const uint64_t seed = call.seed_given ? call.seed.get() : call.seed_number;
    return called_philox_bits(seed, static_cast<uint64_t>(row), static_cast<uint64_t>(element));
  }
  WINNOW_DEVICE uint64_t uniform_bits(int64_t element) const {
    if (element == forced.element) return forced.bits;
    if (!call.uniforms_given) return drawn_bits(element);
    const double u = call.uniforms[row * call.uniforms_stride + element];
    if (!(u > 0.0)) return 0;
    return u < 1.0 ? static_cast<uint64_t>(u * 0x1p64) : ~uint64_t{0};
  }

  // ---- steps; the team meets behind each ----

  // The live particles and where the pinned one is among them.
  WINNOW_DEVICE void list_live() {
    live = call.particles;
    count = call.samples;
    if (call.pinned) {
      pinned = call.pinned[row];
      if (pinned < 0 || pinned >= live || pinned >= count) pinned = -1;
    }
    if (!call.mask) return;
    const auto one_if_live = [&](int64_t k) { return static_cast<uint64_t>(is_live(k) ? 1 : 0); };
    const Range mine = share(call.particles);
    uint64_t set = 0;
    uint64_t set_before = 0;
    for (int64_t k = mine.begin + thread_index(); k < mine.end; k += kThreads) {
      const uint64_t one = one_if_live(k);
      set += one;
      if (k < pinned) set_before += one;
    }
    const TeamSums found = add_up(set, set_before);
    cumulate(mine, found.before.first, one_if_live, [&](int64_t k, uint64_t one, uint64_t rank) {
      if (one != 0) call.slots[row * call.particles + static_cast<int64_t>(rank)] = k;
    });
    live = count = static_cast<int64_t>(found.all.first);
    if (pinned >= 0) pinned = is_live(pinned) ? static_cast<int64_t>(found.all.second) : -1;
    sync();
  }

  WINNOW_DEVICE void find_top() {
    const auto larger = [](double a, double b) { return a > b ? a : b; };
    const double infinity = std::numeric_limits<double>::infinity();
    double best = -infinity;
    bool nan = false;
    const Range mine = share(live);
    for (int64_t k = mine.begin + thread_index(); k < mine.end; k += kThreads) {
      const double x = log_weight(slot(k));
      if (x > best) best = x;
      if (x != x) nan = true;
    }
    top = block_reduce<kThreads>(best, doubles, larger);
    nan = block_any(nan);
    if (!alone()) {
      best = -infinity;
      turn = 1 - turn;
      exchange<kThreads>(team, turn, {bits_as<uint64_t>(top), nan ? uint64_t{1} : 0},
                         [&](int64_t, const Tally& other) {
                           best = larger(best, bits_as<double>(other.first));
                           if (other.second != 0) nan = true;
                         });
      top = block_reduce<kThreads>(best, doubles, larger);
      nan = block_any(nan);
    }
    status = nan ? kStatusNan : 0;
    if (live == 0) {
      status |= kStatusNothingLive;
    } else if (top == infinity) {
      status |= kStatusInfinite;
    } else if (top == -infinity) {
      status |= kStatusNoWeight;
    }
  }

  WINNOW_DEVICE bool weightless() const {
    return (status & (kStatusNoWeight | kStatusNothingLive)) != 0;
  }

  WINNOW_DEVICE void weigh() {
    if (weightless()) return;
    const Range mine = share(live);
    const bool narrow = static_cast<bool>(call.weights.narrow);
    for (int64_t k = mine.begin + thread_index(); k < mine.end; k += kThreads) {
      call.weights.store(row * call.padded + k, weight_of(log_weight(slot(k)), top, narrow));
    }
    block_sync();
    for (int64_t first = mine.begin + warp_index() * kBlock; first < mine.end;
         first += kThreads / kWarp * kBlock) {
      const int64_t n = mine.end - first < kBlock ? mine.end - first : kBlock;
      const int64_t at = row * call.padded + first;
      PartSums found;
      if (narrow) {
        ordered_sums<float>(call.weights.narrow + at, n, &found.sum, &found.squares);
      } else {
        ordered_sums<double>(call.weights.wide + at, n, &found.sum, &found.squares);
      }
      if (lane_index() == 0) call.part[row * call.parts + first / kBlock] = found;
    }
    sync();
  }

  WINNOW_DEVICE void decide() {
    if (weightless()) return;
    const int64_t parts = ceil_div<int64_t>(live, kBlock);
    double squares = 0.0;
    for (int64_t first = 0; first < parts;
         first += kWarp) {  // in order: every thread the same sums
      PartSums mine = {};
      if (first + lane_index() < parts) mine = call.part[row * call.parts + first + lane_index()];
      const int here = parts - first < kWarp ? static_cast<int>(parts - first) : kWarp;
      for (int i = 0; i < here; ++i) {
        sum += shuffle(kFullWarp, mine.sum, i);
        squares += shuffle(kFullWarp, mine.squares, i);
      }
    }
    ess = sum * sum / squares;
    resampled = call.ess_threshold < 0 || ess < call.ess_threshold * static_cast<double>(live);
    if (!resampled) return;
    log_z = log_number(sum / static_cast<double>(live)) + top;
    const int64_t exponent = (bits_as<int64_t>(sum) >> 52) - 1023;
    scale = bits_as<double>((59 - exponent + 1023) << 52);
  }

  // Totals in fixed point, and what the pinned particle decides.
  WINNOW_DEVICE void add_weights() {
    const Range mine = share(live);
    if (pinned >= mine.begin && pinned < mine.end) {  // one without weight gets the least
      if (thread_index() == 0) {
        const int64_t at = row * call.padded + pinned;
        double least = 1.0 / scale;
        if (call.weights.narrow) least = static_cast<double>(static_cast<float>(least));
        if (call.weights[at] < least) call.weights.store(at, least);
      }
      block_sync();
    }
    uint64_t own = 0;
    uint64_t own_before_pinned = 0;
    for (int64_t k = mine.begin + thread_index(); k < mine.end; k += kThreads) {
      const uint64_t weight = fixed_weight(k);
      own += weight;
      if (k < pinned) own_before_pinned += weight;
    }
    const TeamSums found = add_up(own, own_before_pinned);
    total = found.all.first;
    before = found.before.first;
    before_pinned = found.all.second;
    if (pinned < 0 || call.scheme == Scheme::kKilling || call.scheme == Scheme::kOptimal) return;
    forced = called_force(call.scheme, pinned, count, fixed_weight(pinned), before_pinned, total,
                          drawn_bits(kPinnedPoint));
  }
};

}  // namespace
}  // namespace winnow
