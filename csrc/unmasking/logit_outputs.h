// The tensors that logit_stats returns, one entry per row.
#pragma once

#include <tuple>

#include "common/tensors.h"
#include "unmasking/logit_stats.h"

namespace winnow {

// One statistic of every row, float or double.
struct Column {
  Tensor tensor;
  float* narrow;
  double* wide;

  Column(bool present, const Shape& rows, const Tensor& like)
      : tensor(empty(present ? rows : Shape{0}, statistics_dtype(like), like)) {
    const bool is_double = statistics_dtype(like) == ScalarType::Double;
    narrow = present && !is_double ? static_cast<float*>(tensor.data_ptr()) : nullptr;
    wide = present && is_double ? static_cast<double*>(tensor.data_ptr()) : nullptr;
  }

  void put(int64_t row, double value) const {
    if (narrow != nullptr) narrow[row] = static_cast<float>(value);
    if (wide != nullptr) wide[row] = value;
  }
};

struct Outputs {
  Tensor token, argmax;
  Column log_prob, max_prob, margin, entropy, logsumexp, target_log_prob, kl;
  int64_t* tokens;
  int64_t* argmaxes;

  Outputs(const Shape& rows, const Tensor& like, bool has_target, bool has_previous)
      : token(empty(rows, ScalarType::Long, like)),
        argmax(empty(rows, ScalarType::Long, like)),
        log_prob(true, rows, like),
        max_prob(true, rows, like),
        margin(true, rows, like),
        entropy(true, rows, like),
        logsumexp(true, rows, like),
        target_log_prob(has_target, rows, like),
        kl(has_previous, rows, like),
        tokens(static_cast<int64_t*>(token.data_ptr())),
        argmaxes(static_cast<int64_t*>(argmax.data_ptr())) {}

  void put(int64_t row, const RowStats& stats) const {
    tokens[row] = stats.token;
    argmaxes[row] = stats.argmax;
    log_prob.put(row, stats.log_prob);
    max_prob.put(row, stats.max_prob);
    margin.put(row, stats.margin);
    entropy.put(row, stats.entropy);
    logsumexp.put(row, stats.logsumexp);
    target_log_prob.put(row, stats.target_log_prob);
    kl.put(row, stats.kl);
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> tensors()
      const {
    return {token,         log_prob.tensor, argmax,           max_prob.tensor,
            margin.tensor, entropy.tensor,  logsumexp.tensor, target_log_prob.tensor,
            kl.tensor};
  }

  // The active rows of a problem; the others are skipped.
  void put(const LogitProblem& problem, const std::vector<RowStats>& results) const {
    size_t a = 0;
    for (int64_t r = 0; r < problem.arguments.rows.count; ++r) {
      const bool active = a < results.size() && problem.active[a] == r;
      put(r, active ? results[a++] : kSkipped);
    }
  }
};

}  // namespace winnow
