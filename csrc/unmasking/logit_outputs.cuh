// The tensors that logit_stats returns on the GPU.
#pragma once

#include <tuple>

#include "unmasking/logit_rows_kernel.cuh"

namespace winnow {

// One entry per row.
struct LogitOutputs {
  Tensor token;
  Tensor argmax;
  Tensor statistic[7];
  bool has_target;
  bool has_previous;

  LogitOutputs(const Tensor& logits, bool target, bool previous)
      : token(empty(leading_shape(logits), ScalarType::Long, logits)),
        argmax(empty(leading_shape(logits), ScalarType::Long, logits)),
        has_target(target),
        has_previous(previous) {
    for (int i = 0; i < 7; ++i) {
      const bool present = i < 5 || (i == 5 ? target : previous);
      statistic[i] =
          empty(present ? leading_shape(logits) : Shape{0}, statistics_dtype(logits), logits);
    }
  }

  template <typename Real>
  RowOutputs<Real> pointers() const {
    RowOutputs<Real> out = {};
    out.token = global<int64_t>(token);
    out.argmax = global<int64_t>(argmax);
    out.log_prob = global<Real>(statistic[0]);
    out.max_prob = global<Real>(statistic[1]);
    out.margin = global<Real>(statistic[2]);
    out.entropy = global<Real>(statistic[3]);
    out.logsumexp = global<Real>(statistic[4]);
    if (has_target) out.target_log_prob = global<Real>(statistic[5]);
    if (has_previous) out.kl = global<Real>(statistic[6]);
    return out;
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> tensors()
      const {
    return {token,        statistic[0], argmax,       statistic[1], statistic[2],
            statistic[3], statistic[4], statistic[5], statistic[6]};
  }
};

}  // namespace winnow
