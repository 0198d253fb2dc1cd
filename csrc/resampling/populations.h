// What the operators over populations demand of them, on the CPU and on the GPU, and what the
// operators that make one number of each share on the CPU.
#pragma once

#include "common/checks.h"
#include "common/parallel.h"
#include "common/tensors.h"

namespace winnow {

template <typename OnDevice>
void check_populations(const char* argument, const Tensor& tensor, const OnDevice& check_device) {
  check_device(argument, tensor);
  check_floating(argument, tensor);
  WINNOW_CHECK(tensor.dim() >= 1, argument, ": expected (..., K), got a scalar");
}

// Rows spread over threads: loop(log weights, type, stride, rows, particles, results).
template <typename Loop>
Tensor statistic_of_rows(const Tensor& log_weights, const Loop& loop) {
  check_populations("log_weights", log_weights, check_cpu);
  const Rows rows = as_rows(log_weights);
  Tensor result = empty(leading_shape(log_weights), statistics_dtype(log_weights), log_weights);
  const auto* weights = static_cast<const char*>(rows.tensor.data_ptr());
  auto* out = static_cast<char*>(result.data_ptr());
  const auto row_bytes = rows.stride * static_cast<int64_t>(log_weights.element_size());
  const auto result_size = static_cast<int64_t>(result.element_size());
  const ElementType type = element_type(log_weights);
  const int64_t grain = 1 + 32768 / (rows.length + 1);  // about 20 µs of work for a thread
  parallel_for(0, rows.count, grain, [&](int64_t begin, int64_t end) {
    loop(weights + begin * row_bytes, type, rows.stride, end - begin, rows.length,
         out + begin * result_size);
  });
  return result;
}

}  // namespace winnow
