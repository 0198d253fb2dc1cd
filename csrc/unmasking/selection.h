// The choice of one row on the CPU: every rule is an order of the masked positions and a count, how
// long a prefix of that order is unmasked.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/philox.h"
#include "unmasking/selection_rule.h"

namespace winnow {
namespace {

struct Candidate {
  double score;
  uint64_t lot;  // for the random order
  int64_t position;
};

inline void sort_candidates(std::vector<Candidate>& candidates, Order order) {
  std::stable_sort(candidates.begin(), candidates.end(),
                   [&](const Candidate& a, const Candidate& b) {
                     const bool a_nan = std::isnan(a.score);
                     const bool b_nan = std::isnan(b.score);
                     if (a_nan || b_nan) return !a_nan && b_nan;
                     switch (order) {
                       case kLowestFirst:
                         return a.score < b.score;
                       case kHighestFirst:
                         return a.score > b.score;
                       case kRandom:
                         return a.lot < b.lot;
                       default:
                         return false;
                     }
                   });
}

// Both sides in the dtype of the scores: a float32 score of 0.9 meets a threshold of 0.9.
template <typename T>
bool meets(const Rule& rule, double score) {
  const auto threshold = static_cast<double>(static_cast<T>(rule.threshold));
  switch (rule.criterion) {
    case kBelow:
      return score < threshold;
    case kAtLeast:
      return score >= threshold;
    default:
      return true;  // a number of tokens takes NaNs too, last
  }
}

// How many of the candidates, which are in the rule's order, it unmasks.
template <typename T>
int64_t count_prefix(const std::vector<Candidate>& candidates, const Rule& rule) {
  const auto n = static_cast<int64_t>(candidates.size());
  const auto threshold = static_cast<T>(rule.threshold);
  int64_t count = 0;
  if (rule.criterion == kEntropyBound) {
    // Ascending, so the sum without the largest is the sum of those before.
    double before = 0.0;
    while (count < n && static_cast<T>(before) <= threshold) before += candidates[count++].score;
    while (count > 0 && std::isnan(candidates[count - 1].score)) --count;
  } else if (rule.criterion == kConfidenceFactor) {
    for (int64_t i = 1; i <= n; ++i) {
      const double bound = static_cast<double>(i + 1) * (1.0 - candidates[i - 1].score);
      if (static_cast<T>(bound) < threshold) count = i;
    }
  } else {
    while (count < n && meets<T>(rule, candidates[count].score)) ++count;
  }
  return rule.limit >= 0 ? std::min(count, rule.limit) : count;
}

template <typename T>
int64_t select_row(const T* score, const bool* mask, int64_t start, int64_t end, const Rule& rule,
                   int64_t at_least, const uint64_t* seed, int64_t row,
                   std::vector<Candidate>& candidates, bool* transfer) {
  candidates.clear();
  for (int64_t l = start; l < end; ++l) {
    if (!mask[l]) continue;
    const uint64_t lot = seed == nullptr ? 0
                                         : philox_bits(*seed ^ kLotKey, static_cast<uint64_t>(row),
                                                       static_cast<uint64_t>(l));
    candidates.push_back({static_cast<double>(score[l]), lot, l});
  }
  // A left-to-right run ends at a NaN, so it is counted before NaNs are put last.
  int64_t count = rule.order == kLeftToRight ? count_prefix<T>(candidates, rule) : 0;
  const int64_t least =
      std::min(std::max<int64_t>(at_least, 1), static_cast<int64_t>(candidates.size()));
  if (rule.order != kLeftToRight || count < least) sort_candidates(candidates, rule.order);
  if (rule.order != kLeftToRight) count = count_prefix<T>(candidates, rule);
  count = std::max(count, least);
  for (int64_t i = 0; i < count; ++i) transfer[candidates[static_cast<size_t>(i)].position] = true;
  return count;
}

}  // namespace
}  // namespace winnow
