// winnow::sample_without_replacement and winnow::inclusion_probabilities on the CPU: one population
// per row, rows spread over threads.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>
#include <string>

#include "common/parallel.h"
#include "resampling/sample_arguments.h"
#include "resampling/sample_without_replacement_simd.h"

namespace winnow {
namespace {

SampleCall call_of(const Tensor& log_weights, int64_t k, Design design) {
  check_sample(log_weights, k, check_cpu);
  SampleCall call = {};
  call.type = element_type(log_weights);
  call.particles = log_weights.size(log_weights.dim() - 1);
  call.k = k;
  call.design = design;
  return call;
}

void run(SampleCall call, const Tensor& log_weights) {
  const Rows rows = as_rows(log_weights);
  call.log_weights = rows.tensor.data_ptr();
  call.stride = rows.stride;
  const int64_t work = call.design == Design::kConditionalPoisson ? call.k + 16 : 16;
  const int64_t grain = 1 + 32768 / (work * (call.particles + 1));
  const auto loop = WINNOW_SIMD(sample_rows);
  parallel_for(0, rows.count, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> memory(
        new double[static_cast<size_t>(sample_scratch(call)) / sizeof(double)]);
    loop(call, begin, end, memory.get());
  });
}

Sample sample_without_replacement(const Tensor& log_weights, int64_t k, const std::string& design,
                                  int64_t seed, const std::optional<Tensor>& seed_tensor) {
  SampleCall call = call_of(log_weights, k, design_of(design));
  call.seed = static_cast<uint64_t>(seed);
  if (seed_tensor.has_value()) call.seed = host_seed(*seed_tensor);
  const Sample sample = empty_sample(log_weights, k);
  if (k == 0) return sample;
  const auto& [indices, inclusion, weights] = sample;
  call.indices = static_cast<int64_t*>(indices.data_ptr());
  call.inclusion = inclusion.data_ptr();
  call.weights = weights.data_ptr();
  run(call, log_weights);
  return sample;
}

Tensor inclusion_probabilities(const Tensor& log_weights, int64_t k) {
  SampleCall call = call_of(log_weights, k, Design::kConditionalPoisson);
  const Tensor inclusion = empty(shape(log_weights), statistics_dtype(log_weights), log_weights);
  call.inclusion = inclusion.data_ptr();
  run(call, log_weights);
  return inclusion;
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("sample_without_replacement", TORCH_BOX(&winnow::sample_without_replacement));
  m.impl("inclusion_probabilities", TORCH_BOX(&winnow::inclusion_probabilities));
}
