// What the operators that measure logits on the CPU share: answers to a problem, whole and row by
// row.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "unmasking/logit_distribution.h"
#include "unmasking/logit_problem.h"

namespace winnow {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr Truncation kKeepAll = {-std::numeric_limits<float>::infinity(), 0, -1};

// Statistics in double; the caller rounds. NaN until known. Ids are of the whole vocabulary.
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

constexpr RowStats kSkipped = {-1, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0};

// Of the active rows, in order. `parts` (or null) gets every row's part of the vocabulary, float or
// double as the logits are, part_words() for each row.
std::vector<RowStats> measure_rows(const LogitProblem& problem, void* parts = nullptr);
int64_t part_words(const LogitProblem& problem);

// The sums of every block of the rows, row after row, spread over threads.
std::unique_ptr<LogitBlockSums[]> scan_rows(const LogitRows& view, const std::vector<int64_t>& rows,
                                            double temperature, double draw_temperature);

// ---- one row ----

// Fills in what follows from the distribution alone; false where there is none: a NaN, nothing
// finite, or an infinite logit.
bool describe(const LogitDistribution& row, int64_t start, RowStats& stats);

// KL(current || previous), from the blocks' sums and cross terms.
double divergence(const LogitRows& rows, const LogitDistribution& measured,
                  const LogitBlockSums* sums, const LogitBlockSums* previous_sums,
                  const float* cross);
float block_cross(const LogitRows& rows, const LogitRows& previous, int64_t row, int64_t block,
                  const LogitBlockSums& sums, const LogitBlockSums& previous_sums,
                  double temperature, const Truncation& kept);

std::vector<double> load_double_row(const LogitRows& rows, int64_t row);
// A float64 row whose logits are at `source`; `previous` and `target` may be null.
RowStats double_row_stats(const LogitRows& rows, const LogitRows* previous, int64_t key,
                          int64_t source, const LogitOptions& options, uint64_t seed,
                          const int64_t* target);

}  // namespace winnow
