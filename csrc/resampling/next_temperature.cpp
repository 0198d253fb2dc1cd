// winnow::next_temperature and winnow::conditional_effective_sample_size on the CPU: one population
// per row, rows spread over threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <optional>

#include "common/checks.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "resampling/next_temperature_simd.h"
#include "resampling/tempering_arguments.h"

namespace winnow {
namespace {

template <typename Loop>
void over_rows(const TemperingCall& call, int64_t rows, int64_t passes, const Loop& loop) {
  const int64_t grain = 1 + 32768 / passes / (call.particles + 1);  // about 20 µs for a thread
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const auto bytes = static_cast<size_t>(tempering_scratch(call)) + 63;
    const std::unique_ptr<char[]> memory(new char[bytes]);
    const auto start = (reinterpret_cast<uintptr_t>(memory.get()) + 63) & ~uintptr_t{63};
    loop(call, begin, end, reinterpret_cast<void*>(start));
  });
}

Tensor next_temperature(const Tensor& log_likelihood, const Tensor& beta, double target_ess,
                        double max_beta, std::optional<Tensor> log_weights) {
  check_tempering(log_likelihood, beta, target_ess, max_beta, log_weights, check_cpu);
  const ScalarType dtype = beta.scalar_type();
  const Rows rows = as_rows(log_likelihood);
  Rows weights = rows;
  TemperingCall call = {};
  if (log_weights.has_value()) {
    weights = as_rows(*log_weights);
    call.log_weights = weights.tensor.data_ptr();
    call.weights_stride = weights.stride;
  }
  const Tensor start = dense(torch::stable::to(beta, ScalarType::Double));
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
  check_populations("log_weights", log_weights, check_cpu);
  check_same("log_increments", log_increments, "log_weights", log_weights, check_cpu);
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
