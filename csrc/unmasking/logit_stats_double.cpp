// logit_stats of one float64 row: the definition in scalar arithmetic, for oracles and
// gradient-free checks in double. One row is copied at a time.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "unmasking/logit_draw.h"
#include "unmasking/logit_stats.h"

namespace winnow {
namespace {

struct Summary {
  double top = -kInfinity;
  double second = -kInfinity;
  int64_t argmax = -1;
  double log_mass = kNan;
  double entropy = kNan;
};

// NaN anywhere gives a NaN log_mass.
Summary summarise(const std::vector<double>& x, double temperature) {
  Summary row;
  for (size_t i = 0; i < x.size(); ++i) {
    if (x[i] > row.top) {
      row.second = row.top;
      row.top = x[i];
      row.argmax = static_cast<int64_t>(i);
    } else if (x[i] > row.second) {
      row.second = x[i];
    }
  }
  double mass = 0.0;
  double moment = 0.0;
  for (const double logit : x) {
    const double t = (logit - row.top) / temperature;
    const double e = std::exp(t);
    mass += e;
    if (e > 0.0) moment += t * e;
  }
  row.log_mass = std::log(mass);
  row.entropy = row.log_mass - moment / mass;
  return row;
}

// Suppresses what top-k, top-p and min-p leave out.
void truncate(std::vector<double>& x, double top, const LogitOptions& options) {
  std::vector<size_t> order(x.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return x[a] > x[b]; });
  size_t kept = order.size();
  if (options.top_k > 0) kept = std::min(kept, static_cast<size_t>(options.top_k));
  const auto weight = [&](size_t rank) {
    return std::exp((x[order[rank]] - top) / options.draw_temperature);
  };
  if (options.top_p < 1.0) {
    double total = 0.0;
    for (size_t rank = 0; rank < kept; ++rank) total += weight(rank);
    double before = weight(0);
    size_t nucleus = 1;
    for (; nucleus < kept && before < options.top_p * total; ++nucleus) before += weight(nucleus);
    kept = nucleus;
  }
  while (x[order[kept - 1]] < top + options.reach()) --kept;
  for (size_t rank = kept; rank < order.size(); ++rank) x[order[rank]] = -kInfinity;
}

// As for float32: first a block, then a token in it.
int64_t draw(const std::vector<double>& x, double top, const LogitRows& rows, int64_t key,
             double temperature, uint64_t seed) {
  const auto weight = [&](int64_t i) {
    return std::exp((x[static_cast<size_t>(i)] - top) / temperature);
  };
  const int64_t blocks = logit_blocks(rows.start, rows.vocab);
  std::vector<double> masses(static_cast<size_t>(blocks));
  BlockRace race(seed, key);
  for (int64_t b = 0; b < blocks; ++b) {
    double& mass = masses[static_cast<size_t>(b)];
    for (int64_t i = block_begin(rows, b); i < block_end(rows, b); ++i) mass += weight(i);
    race.enter(b, rows.start / kLogitBlock + b, mass);
  }
  double left = race.uniform() * masses[static_cast<size_t>(race.block())];
  int64_t token = -1;
  for (int64_t i = block_begin(rows, race.block()); i < block_end(rows, race.block()); ++i) {
    if (!(weight(i) > 0.0)) continue;
    token = i;
    if (left < weight(i)) break;
    left -= weight(i);
  }
  return token;
}

}  // namespace

std::vector<double> load_double_row(const LogitRows& rows, int64_t row) {
  const double* logits = static_cast<const double*>(rows.logits) + row * rows.stride;
  std::vector<double> x(logits, logits + rows.vocab);
  if (rows.unconditional != nullptr) {
    const double* base =
        static_cast<const double*>(rows.unconditional) + row * rows.unconditional_stride;
    for (size_t i = 0; i < x.size(); ++i) {
      if (x[i] != base[i]) x[i] = base[i] + rows.guidance * (x[i] - base[i]);
    }
  }
  for (int64_t s = 0; s < rows.suppressed_count; ++s) {
    x[static_cast<size_t>(rows.suppressed[s])] = -kInfinity;
  }
  return x;
}

RowStats double_row_stats(const LogitRows& rows, const LogitRows* previous, int64_t key,
                          int64_t source, const LogitOptions& options, uint64_t seed,
                          const int64_t* target) {
  RowStats stats;
  std::vector<double> x = load_double_row(rows, source);
  const bool nan = std::any_of(x.begin(), x.end(), [](double logit) { return std::isnan(logit); });
  Summary measured = summarise(x, options.temperature);
  if (nan) return stats;
  if (std::isinf(measured.top)) {
    stats.logsumexp = measured.top;
    if (measured.argmax >= 0) stats.token = stats.argmax = rows.start + measured.argmax;
    return stats;
  }
  std::vector<double> drawn = x;
  if (options.truncates()) truncate(drawn, measured.top, options);
  const std::vector<double>& x_measured = options.raw ? x : drawn;
  if (!options.raw) measured = summarise(drawn, options.temperature);
  const double t = options.temperature;
  const auto log_prob = [&](int64_t index) {
    return (x_measured[static_cast<size_t>(index)] - measured.top) / t - measured.log_mass;
  };
  const int64_t token = options.draws
                            ? draw(drawn, measured.top, rows, key, options.draw_temperature, seed)
                            : measured.argmax;
  stats.argmax = rows.start + measured.argmax;
  stats.token = rows.start + token;
  stats.log_prob = log_prob(token);
  stats.max_prob = std::exp(-measured.log_mass);
  stats.margin = stats.max_prob * (1.0 - std::exp((measured.second - measured.top) / t));
  stats.entropy = measured.entropy;
  stats.logsumexp = measured.top / t + measured.log_mass;
  if (target != nullptr) {
    const int64_t at = *target - rows.start;
    stats.target_log_prob = at >= 0 && at < rows.vocab ? log_prob(at) : -kInfinity;
  }
  if (previous != nullptr) {
    const std::vector<double> y = load_double_row(*previous, source);
    const Summary before = summarise(y, t);
    double divergence = 0.0;
    for (size_t i = 0; i < y.size(); ++i) {
      const double log_p = log_prob(static_cast<int64_t>(i));
      const double p = std::exp(log_p);
      if (p > 0.0) divergence += p * (log_p - ((y[i] - before.top) / t - before.log_mass));
    }
    if (before.top == -kInfinity) divergence = kInfinity;
    const bool lost = before.top == kInfinity || std::any_of(y.begin(), y.end(), [](double logit) {
                        return std::isnan(logit);
                      });
    stats.kl = lost ? kNan : divergence > 0.0 ? divergence : 0.0;
  }
  return stats;
}

}  // namespace winnow
