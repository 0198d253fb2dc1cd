// winnow::log_mean_exp and winnow::weight_entropy on the CPU: one population per row, rows spread
// over threads.
#include <torch/csrc/stable/library.h>

#include "common/checks.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "resampling/weight_statistics_simd.h"

namespace winnow {
namespace {

template <WeightStatistic kStatistic>
Tensor weight_statistic(const Tensor& log_weights) {
  check_floating("log_weights", log_weights);
  WINNOW_CHECK(log_weights.dim() >= 1, "log_weights: expected (..., K), got a scalar");
  const Rows rows = as_rows(log_weights);
  Tensor result = empty(leading_shape(log_weights), statistics_dtype(log_weights), log_weights);

  const auto* weights = static_cast<const char*>(rows.tensor.data_ptr());
  auto* out = static_cast<char*>(result.data_ptr());
  const auto weight_size = static_cast<int64_t>(log_weights.element_size());
  const auto result_size = static_cast<int64_t>(result.element_size());
  const ElementType type = element_type(log_weights);
  const auto loop = WINNOW_SIMD(weight_statistic_rows);
  const int64_t grain = 1 + 32768 / (rows.length + 1);  // about 20 µs of work for a thread
  parallel_for(0, rows.count, grain, [&](int64_t begin, int64_t end) {
    loop(kStatistic, weights + begin * rows.stride * weight_size, type, rows.stride, end - begin,
         rows.length, out + begin * result_size);
  });
  return result;
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("log_mean_exp",
         TORCH_BOX(&winnow::weight_statistic<winnow::WeightStatistic::kLogMeanExp>));
  m.impl("weight_entropy", TORCH_BOX(&winnow::weight_statistic<winnow::WeightStatistic::kEntropy>));
}
