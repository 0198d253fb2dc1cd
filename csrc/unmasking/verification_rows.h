// Rows of target and draft logits as speculative_verify asks about them: one implementation for
// float, bfloat16 and half, which runs the vector loops, and one for double, in scalar arithmetic.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "unmasking/logit_distribution.h"
#include "unmasking/logit_stats_simd.h"
#include "unmasking/speculative_verify_simd.h"

namespace winnow {

// A row's distribution. Not proper: a NaN, an infinite logit, or nothing finite.
struct MeasuredRow {
  double reference = 0.0;  // the largest logit
  double log_mass = 0.0;   // log of the sum of exp((x - reference) / temperature)
  int64_t argmax = -1;
  bool proper = false;

  double log_prob(double logit, double temperature) const {
    return (logit - reference) / temperature - log_mass;
  }
};

// Where a token is drawn: row and distribution of the target, and of the draft (row -1: none).
struct ResidualPlace {
  int64_t target;
  MeasuredRow target_measured;
  int64_t draft;
  MeasuredRow draft_measured;
  int64_t excluded;  // a token that must not be drawn, or -1
};

class FloatVerification {
 public:
  FloatVerification(const LogitRows& target, const LogitRows& draft, double temperature)
      : target_(target), draft_(draft), temperature_(temperature) {}

  std::vector<MeasuredRow> measure(bool of_target, const std::vector<int64_t>& rows) const {
    const LogitRows& view = of_target ? target_ : draft_;
    const int64_t blocks = logit_blocks(view.start, view.vocab);
    const auto count = static_cast<int64_t>(rows.size());
    std::vector<LogitBlockSums> sums(static_cast<size_t>(count * blocks));
    const auto scan = WINNOW_SIMD(scan_logit_blocks);
    parallel_for(0, count * blocks, 32, [&](int64_t begin, int64_t end) {
      scan(view, rows.data(), begin, end - begin, temperature_, temperature_, sums.data() + begin);
    });
    std::vector<MeasuredRow> measured(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) {
      const LogitDistribution row =
          merge_blocks(view, sums.data() + static_cast<int64_t>(i) * blocks, temperature_);
      measured[i] = {row.reference, std::log(row.mass), row.argmax,
                     !row.nan && std::isfinite(row.reference)};
    }
    return measured;
  }

  double logit(bool of_target, int64_t row, int64_t index) const {
    float x = 0.0f;
    WINNOW_SIMD(copy_logits)(of_target ? target_ : draft_, row, index, 1, &x);
    return x;
  }

  double block_mass(const ResidualPlace& place, int64_t block) const {
    double mass = 0.0;
    WINNOW_SIMD(sum_residual_block)
    (target_, draft_, narrow(place), temperature_, block, &mass);
    return mass;
  }

  int64_t draw(const ResidualPlace& place, int64_t block, double uniform) const {
    int64_t token = -1;
    WINNOW_SIMD(draw_in_residual_block)
    (target_, draft_, narrow(place), temperature_, block, uniform, &token);
    return token;
  }

 private:
  static ResidualRow narrow(const ResidualPlace& place) {
    return {place.target,
            static_cast<float>(place.target_measured.reference),
            static_cast<float>(std::exp(-place.target_measured.log_mass)),
            place.draft,
            static_cast<float>(place.draft_measured.reference),
            static_cast<float>(std::exp(-place.draft_measured.log_mass)),
            place.excluded};
  }

  const LogitRows target_;
  const LogitRows draft_;
  const double temperature_;
};

class DoubleVerification {
 public:
  DoubleVerification(const LogitRows& target, const LogitRows& draft, double temperature)
      : target_(target), draft_(draft), temperature_(temperature) {}

  std::vector<MeasuredRow> measure(bool of_target, const std::vector<int64_t>& rows) const {
    std::vector<MeasuredRow> measured(rows.size());
    const int64_t vocab = target_.vocab;
    const auto count = static_cast<int64_t>(rows.size());
    parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i) {
        MeasuredRow row = {-std::numeric_limits<double>::infinity(), 0.0, -1, true};
        const double* x = data(of_target, rows[i]);
        for (int64_t v = 0; v < vocab; ++v) {
          row.proper = row.proper && !std::isnan(x[v]);
          if (!(x[v] > row.reference)) continue;
          row.reference = x[v];
          row.argmax = v;
        }
        row.proper = row.proper && std::isfinite(row.reference);
        double mass = 0.0;
        for (int64_t v = 0; v < vocab; ++v) mass += std::exp((x[v] - row.reference) / temperature_);
        row.log_mass = std::log(mass);
        measured[i] = row;
      }
    });
    return measured;
  }

  double logit(bool of_target, int64_t row, int64_t index) const {
    return data(of_target, row)[index];
  }

  double block_mass(const ResidualPlace& place, int64_t block) const {
    double mass = 0.0;
    for (int64_t v = block_begin(target_, block); v < block_end(target_, block); ++v)
      mass += weight(place, v);
    return mass;
  }

  int64_t draw(const ResidualPlace& place, int64_t block, double uniform) const {
    double left = uniform * block_mass(place, block);
    int64_t token = -1;
    for (int64_t v = block_begin(target_, block); v < block_end(target_, block); ++v) {
      const double w = weight(place, v);
      if (!(w > 0.0)) continue;
      token = v;
      if (left < w) break;
      left -= w;
    }
    return token;
  }

 private:
  const double* data(bool of_target, int64_t row) const {
    const LogitRows& view = of_target ? target_ : draft_;
    return static_cast<const double*>(view.logits) + row * view.stride;
  }

  double weight(const ResidualPlace& place, int64_t v) const {
    if (v == place.excluded) return 0.0;
    const double p =
        std::exp(place.target_measured.log_prob(data(true, place.target)[v], temperature_));
    if (place.draft < 0) return p;
    const double q =
        std::exp(place.draft_measured.log_prob(data(false, place.draft)[v], temperature_));
    return p > q ? p - q : 0.0;
  }

  const LogitRows target_;
  const LogitRows draft_;
  const double temperature_;
};

}  // namespace winnow
