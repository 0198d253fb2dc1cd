// One row's distribution from the sums of its slices: scalar arithmetic in double.
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

// Exact for any slicing: the sums are moved to the common reference.
inline LogitDistribution merge_slices(const LogitSliceSums* sums, int64_t slices,
                                      double temperature) {
  LogitDistribution row;
  row.temperature = temperature;
  double first = row.reference;
  for (int64_t s = 0; s < slices; ++s) {
    row.nan = row.nan || std::isnan(sums[s].moment);
    if (sums[s].reference > row.reference) row.reference = sums[s].reference;
    const double candidates[] = {sums[s].first, sums[s].second};
    for (const double x : candidates) {
      if (x > first) {  // a tie stays with the earlier slice
        row.second = first;
        first = x;
        row.argmax = sums[s].argmax;
      } else if (x > row.second) {
        row.second = x;
      }
    }
  }
  for (int64_t s = 0; s < slices; ++s) {
    const double shift = (sums[s].reference - row.reference) / temperature;
    const double weight = std::exp(shift);
    if (!(weight > 0.0)) continue;  // also where nothing has any mass: NaN
    row.mass += weight * sums[s].mass;
    row.moment += weight * (sums[s].moment + shift * sums[s].mass);
  }
  return row;
}

}  // namespace winnow
