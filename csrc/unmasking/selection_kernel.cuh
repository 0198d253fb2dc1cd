// The choice of positions on the GPU. A block per row: every masked position in the window counts
// the ones before it in the rule's order, and the entropy that they hold, by looking at all of
// them, tile by tile through shared memory. The rule then follows from these ranks by one
// reduction; nothing is sorted. Windows are hundreds of positions, so the square of their length
// costs microseconds.
#pragma once

#include "common/device.h"
#include "common/philox.h"
#include "unmasking/selection_rule.h"

namespace winnow {
namespace {

constexpr int kChoosers = 256;  // threads of a row

struct Selection {
  Global<const int64_t> window;    // or null
  Global<const int64_t> at_least;  // or null
  Seed seed;
  Rule rule;
  int64_t length;
  Global<int64_t> rank;      // (B, L): in the rule's order, NaNs last
  Global<int64_t> leftmost;  // (B, L): from left to right, for that order alone
  Global<bool> transfer;
  Global<int64_t> count;
};

struct Place {
  double score;
  uint64_t lot;  // for the random order
  int64_t position;
};

// NaNs come last; of equals the lower position is first.
WINNOW_DEVICE bool comes_before(const Place& a, const Place& b, Order order) {
  const bool a_nan = a.score != a.score;
  const bool b_nan = b.score != b.score;
  if (a_nan != b_nan) return b_nan;
  if (!a_nan) {
    if (order == kLowestFirst && a.score != b.score) return a.score < b.score;
    if (order == kHighestFirst && a.score != b.score) return a.score > b.score;
    if (order == kRandom && a.lot != b.lot) return a.lot < b.lot;
  }
  return a.position < b.position;
}

// Whether the rule takes a position that has `rank` others before it, whose scores sum to `before`.
// Both sides in the dtype of the scores: a float32 score of 0.9 meets a threshold of 0.9.
template <typename T>
WINNOW_DEVICE bool meets(const Rule& rule, double score, double before) {
  const T threshold = static_cast<T>(rule.threshold);
  switch (rule.criterion) {
    case kBelow:
      return score < static_cast<double>(threshold);
    case kAtLeast:
      return score >= static_cast<double>(threshold);
    case kEntropyBound:
      return score == score && static_cast<T>(before) <= threshold;
    default:
      return true;  // a number of tokens takes NaNs too, last
  }
}

// Scores and mask as select_positions gets them. `T` is the dtype of the scores.
template <typename T>
struct GivenScores {
  using Score = T;
  Global<const T> scores;
  Global<const bool> mask;

  WINNOW_DEVICE bool masked(int64_t at) const {
    const bool is = mask[at];
    return is;
  }
  WINNOW_DEVICE double score(int64_t at) const {
    return static_cast<double>(static_cast<T>(scores[at]));
  }
  WINNOW_DEVICE bool take(int64_t) const { return true; }
};

// `source` says which positions are masked and how good they are, and takes what is chosen.
template <typename Source>
WINNOW_KERNEL(kChoosers)
select_rows(Source source, Selection call) {
  using T = typename Source::Score;
  WINNOW_SHARED(Place, tile, kChoosers);
  WINNOW_SHARED(int64_t, scratch, kChoosers / kWarp);
  const int64_t row = block_index();
  const auto rank = call.rank + row * call.length;
  const auto leftmost = call.leftmost + row * call.length;
  const Rule rule = call.rule;
  int64_t start = 0;
  int64_t end = call.length;
  if (call.window) {
    const int64_t first = call.window[2 * row];
    const int64_t last = call.window[2 * row + 1];
    start = first > 0 ? first : 0;
    end = last < call.length ? last : call.length;
  }
  const auto place = [&](int64_t l) {
    Place p = {0.0, 0, -1};  // no candidate
    if (l >= end) return p;
    if (!source.masked(row * call.length + l)) return p;
    p.score = source.score(row * call.length + l);
    p.position = l;
    if (rule.order == kRandom) {
      p.lot = philox_bits(call.seed.get() ^ kLotKey, static_cast<uint64_t>(row),
                          static_cast<uint64_t>(l));
    }
    return p;
  };

  // The first rank that the rule does not take, or for ConfidenceFactor the last one that it does.
  const int64_t never = int64_t{1} << 62;
  int64_t candidates = 0;
  int64_t first_refused = never;
  int64_t taken = 0;
  for (int64_t mine = start; mine < end; mine += kChoosers) {
    const int64_t l = mine + thread_index();
    const Place own = place(l);
    int64_t before = 0;
    int64_t left = 0;
    double sum = 0.0;
    for (int64_t other = start; other < end; other += kChoosers) {
      block_sync();
      tile[thread_index()] = place(other + thread_index());
      block_sync();
      for (int j = 0; j < kChoosers && other + j < end; ++j) {
        const Place p = tile[j];
        if (p.position < 0 || own.position < 0) continue;
        if (comes_before(p, own, rule.order)) {
          ++before;
          sum += p.score;
        }
        if (p.position < own.position) ++left;
      }
    }
    if (own.position < 0) continue;
    ++candidates;
    rank[l] = before;
    leftmost[l] = left;
    // A left-to-right run ends at a NaN, wherever it stands.
    const int64_t at = rule.order == kLeftToRight ? left : before;
    if (rule.criterion == kConfidenceFactor) {
      const double bound = static_cast<double>(at + 2) * (1.0 - own.score);
      if (static_cast<T>(bound) < static_cast<T>(rule.threshold) && at + 1 > taken) taken = at + 1;
    } else if (!meets<T>(rule, own.score, sum) && at < first_refused) {
      first_refused = at;
    }
  }
  const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
  const auto most = [](int64_t a, int64_t b) { return a > b ? a : b; };
  const auto plus = [](int64_t a, int64_t b) { return a + b; };
  candidates = block_reduce<kChoosers>(candidates, Shared<int64_t>(scratch), plus);
  first_refused = block_reduce<kChoosers>(first_refused, Shared<int64_t>(scratch), least);
  taken = block_reduce<kChoosers>(taken, Shared<int64_t>(scratch), most);

  int64_t count = rule.criterion == kConfidenceFactor ? taken : least(first_refused, candidates);
  if (rule.limit >= 0) count = least(count, rule.limit);
  int64_t floor = 1;
  if (call.at_least) {
    const int64_t wanted = call.at_least[row];
    floor = most(wanted, 1);
  }
  floor = least(floor, candidates);
  const bool runs = rule.order == kLeftToRight && count >= floor;
  count = most(count, floor);
  int64_t written = 0;
  for (int64_t l = thread_index(); l < call.length; l += kChoosers) {
    const int64_t index = row * call.length + l;
    bool takes = false;
    if (l >= start && l < end && source.masked(index)) {
      const int64_t at = runs ? leftmost[l] : rank[l];
      takes = at < count && source.take(index);
    }
    call.transfer[index] = takes;
    written += takes ? 1 : 0;
  }
  written = block_reduce<kChoosers>(written, Shared<int64_t>(scratch), plus);
  if (thread_index() == 0) call.count[row] = written;
}

}  // namespace
}  // namespace winnow
