// One row's distribution from the sums of its blocks: scalar arithmetic in double.
#pragma once

#include <cmath>
#include <limits>

#include "unmasking/logit_rows.h"

namespace winnow {

struct LogitDistribution {
  double temperature = 1.0;
  double reference = -std::numeric_limits<double>::infinity();  // the largest logit
  double second = -std::numeric_limits<double>::infinity();
  int64_t argmax = -1;
  double mass = 0.0;    // sum of exp(t), t = (x - reference) / temperature
  double moment = 0.0;  // sum of t exp(t)
  bool nan = false;

  double log_prob(double logit) const { return (logit - reference) / temperature - std::log(mass); }
  double max_prob() const { return 1.0 / mass; }
  double margin() const { return (1.0 - std::exp((second - reference) / temperature)) / mass; }
  double entropy() const { return std::log(mass) - moment / mass; }
  double logsumexp() const { return reference / temperature + std::log(mass); }
};

// The same for any division of the blocks: a sum over all of them in order, at the common
// reference.
inline LogitDistribution merge_blocks(const LogitRows& rows, const LogitBlockSums* sums,
                                      double temperature) {
  LogitDistribution row;
  row.temperature = temperature;
  const int64_t blocks = logit_blocks(rows.start, rows.vocab);
  for (int64_t b = 0; b < blocks; ++b) {
    const double first = sums[b].reference;
    row.nan = row.nan || std::isnan(sums[b].moment);
    if (first > row.reference) {  // a tie stays with the earlier block
      row.second = row.reference;
      row.reference = first;
      row.argmax = block_begin(rows, b) + static_cast<int64_t>(sums[b].at);
    } else if (first > row.second) {
      row.second = first;
    }
    if (sums[b].second > row.second) row.second = sums[b].second;
  }
  for (int64_t b = 0; b < blocks; ++b) {
    const double shift = (sums[b].reference - row.reference) / temperature;
    const double weight = std::exp(shift);
    if (!(weight > 0.0)) continue;  // also where nothing has any mass: NaN
    row.mass += weight * sums[b].mass;
    row.moment += weight * (sums[b].moment * kMomentUnit + shift * sums[b].mass);
  }
  return row;
}

}  // namespace winnow
