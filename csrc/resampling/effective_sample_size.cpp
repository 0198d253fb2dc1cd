// winnow::effective_sample_size on the CPU: one population per row, rows spread over threads.
#include "resampling/effective_sample_size_simd.h"

#include <torch/csrc/stable/library.h>

#include "common/checks.h"
#include "common/parallel.h"
#include "common/tensors.h"

namespace winnow {
namespace {

Tensor effective_sample_size(const Tensor& log_weights) {
  check_floating("log_weights", log_weights);
  WINNOW_CHECK(log_weights.dim() >= 1, "log_weights: expected (..., K), got a scalar");
  const Rows rows = as_rows(log_weights);
  Tensor result = empty(leading_shape(log_weights), statistics_dtype(log_weights), log_weights);

  const auto* weights = static_cast<const char*>(rows.tensor.data_ptr());
  auto* out = static_cast<char*>(result.data_ptr());
  const auto weight_size = static_cast<int64_t>(log_weights.element_size());
  const auto result_size = static_cast<int64_t>(result.element_size());
  const ElementType type = element_type(log_weights);
  const auto loop = WINNOW_SIMD(effective_sample_size_rows);
  const int64_t grain = 1 + 32768 / (rows.length + 1);  // about 20 µs of work for a thread
  parallel_for(0, rows.count, grain, [&](int64_t begin, int64_t end) {
    loop(weights + begin * rows.stride * weight_size, type, rows.stride, end - begin, rows.length,
         out + begin * result_size);
  });
  return result;
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("effective_sample_size", TORCH_BOX(&winnow::effective_sample_size));
}
