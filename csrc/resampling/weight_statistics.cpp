// winnow::log_mean_exp and winnow::weight_entropy on the CPU: one population per row, rows spread
// over threads.
#include <torch/csrc/stable/library.h>

#include "resampling/populations.h"
#include "resampling/weight_statistics_simd.h"

namespace winnow {
namespace {

template <WeightStatistic kStatistic>
Tensor weight_statistic(const Tensor& log_weights) {
  const auto loop = WINNOW_SIMD(weight_statistic_rows);
  return statistic_of_rows(log_weights, [&](const auto&... rows) { loop(kStatistic, rows...); });
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("log_mean_exp",
         TORCH_BOX(&winnow::weight_statistic<winnow::WeightStatistic::kLogMeanExp>));
  m.impl("weight_entropy", TORCH_BOX(&winnow::weight_statistic<winnow::WeightStatistic::kEntropy>));
}
