// What the parts of logit_stats share: the checked options and one row's answer.
#pragma once

#include <cstdint>
#include <limits>

#include "unmasking/logit_rows.h"

namespace winnow {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct LogitOptions {
  double temperature;       // of the statistics
  double draw_temperature;  // of the token; differs from the above for raw statistics only
  bool draws;               // else the token is the argmax
  uint64_t seed;
  bool raw;       // statistics come before truncation
  int64_t top_k;  // 0: all
  double top_p;   // 1: all

  bool truncates() const { return top_k > 0 || top_p < 1.0; }
};

// Statistics in double; the caller rounds. NaN until known.
struct RowStats {
  int64_t token = -1;
  int64_t argmax = -1;
  double log_prob = kNan;
  double max_prob = kNan;
  double margin = kNan;
  double entropy = kNan;
  double logsumexp = kNan;
  double target_log_prob = kNan;
  double kl = kNan;
};

// A float64 row; `previous` and `target` may be null.
RowStats double_row_stats(const LogitRows& rows, const LogitRows* previous, int64_t row,
                          const LogitOptions& options, const int64_t* target);

}  // namespace winnow
