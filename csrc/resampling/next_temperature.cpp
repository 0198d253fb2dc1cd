// winnow::next_temperature and winnow::conditional_effective_sample_size on the CPU: one population
// per row, rows spread over threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <optional>

#include "common/checks.h"
#include "common/tensors.h"
#include "resampling/next_temperature_simd.h"

namespace winnow {
namespace {

void check_populations(const char* argument, const Tensor& tensor) {
  check_cpu(argument, tensor);
  check_floating(argument, tensor);
  WINNOW_CHECK(tensor.dim() >= 1, argument, ": expected (..., K), got a scalar");
}

void check_same(const char* argument, const Tensor& tensor, const char* other,
                const Tensor& expected) {
  check_cpu(argument, tensor);
  check_dtype(argument, tensor, expected.scalar_type());
  WINNOW_CHECK(shape(tensor) == shape(expected), argument, ": expected the shape of ", other, " ",
               shape_of(expected), ", got ", shape_of(tensor));
}

template <typename Loop>
void over_rows(const TemperingCall& call, int64_t rows, int64_t passes, const Loop& loop) {
  const int64_t grain = 1 + 32768 / passes / (call.particles + 1);  // about 20 µs for a thread
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const auto bytes = static_cast<size_t>(tempering_scratch(call)) + 63;
    const std::unique_ptr<char[]> memory(new char[bytes]);
    const auto start = (reinterpret_cast<uintptr_t>(memory.get()) + 63) & ~uintptr_t{63};
    loop(call, begin, end, reinterpret_cast<void*>(start));
  });
}

Tensor next_temperature(const Tensor& log_likelihood, const Tensor& beta, double target_ess,
                        double max_beta, std::optional<Tensor> log_weights) {
  check_populations("log_likelihood", log_likelihood);
  check_cpu("beta", beta);
  const ScalarType dtype = beta.scalar_type();
  WINNOW_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
               "beta: expected float32 or float64, got ", name_of(dtype));
  WINNOW_CHECK(shape(beta) == leading_shape(log_likelihood),
               "beta: expected a number for each population of log_likelihood ",
               shape_of(log_likelihood), ", got shape ", shape_of(beta));
  WINNOW_CHECK(target_ess > 0.0 && target_ess <= 1.0,
               "target_ess: expected a share in (0, 1], got ", target_ess);
  WINNOW_CHECK(max_beta - max_beta == 0.0, "max_beta: expected a finite number, got ", max_beta);
  const Rows rows = as_rows(log_likelihood);
  Rows weights = rows;
  TemperingCall call = {};
  if (log_weights.has_value()) {
    check_same("log_weights", *log_weights, "log_likelihood", log_likelihood);
    weights = as_rows(*log_weights);
    call.log_weights = weights.tensor.data_ptr();
    call.weights_stride = weights.stride;
  }
  const Tensor start = torch::stable::contiguous(torch::stable::to(beta, ScalarType::Double));
  Tensor result = empty(shape(beta), dtype, log_likelihood);
  call.log_likelihood = rows.tensor.data_ptr();
  call.type = element_type(log_likelihood);
  call.likelihood_stride = rows.stride;
  call.particles = rows.length;
  call.beta = static_cast<const double*>(start.data_ptr());
  call.target = target_ess;
  call.max_beta = max_beta;
  call.result = result.data_ptr();
  call.wide = dtype == ScalarType::Double;
  over_rows(call, rows.count, 10, WINNOW_SIMD(next_temperature_rows));
  return result;
}

Tensor conditional_effective_sample_size(const Tensor& log_weights, const Tensor& log_increments) {
  check_populations("log_weights", log_weights);
  check_same("log_increments", log_increments, "log_weights", log_weights);
  const Rows rows = as_rows(log_increments);
  const Rows weights = as_rows(log_weights);
  Tensor result = empty(leading_shape(log_weights), statistics_dtype(log_weights), log_weights);
  TemperingCall call = {};
  call.log_likelihood = rows.tensor.data_ptr();
  call.log_weights = weights.tensor.data_ptr();
  call.type = element_type(log_weights);
  call.likelihood_stride = rows.stride;
  call.weights_stride = weights.stride;
  call.particles = rows.length;
  call.result = result.data_ptr();
  over_rows(call, rows.count, 4, WINNOW_SIMD(conditional_ess_rows));
  return result;
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("next_temperature", TORCH_BOX(&winnow::next_temperature));
  m.impl("conditional_effective_sample_size",
         TORCH_BOX(&winnow::conditional_effective_sample_size));
}
