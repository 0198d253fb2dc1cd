// What sample_without_replacement and inclusion_probabilities accept and return, on the CPU and on
// the GPU.
#pragma once

#include <string>
#include <tuple>

#include "resampling/design.h"
#include "resampling/populations.h"

namespace winnow {

using Sample = std::tuple<Tensor, Tensor, Tensor>;  // indices, inclusion probabilities, weights

inline Design design_of(const std::string& name) {
  if (name == "gumbel_topk") return Design::kGumbelTopK;
  if (name == "conditional_poisson") return Design::kConditionalPoisson;
  if (name == "pareto") return Design::kPareto;
  fail("design: expected gumbel_topk, conditional_poisson or pareto, got '", name, "'");
}

template <typename OnDevice>
void check_sample(const Tensor& log_weights, int64_t k, const OnDevice& check_device) {
  check_populations("log_weights", log_weights, check_device);
  const int64_t particles = log_weights.size(log_weights.dim() - 1);
  WINNOW_CHECK(k >= 0 && k <= particles, "k: expected 0 to K = ", particles, ", got ", k);
}

inline Sample empty_sample(const Tensor& log_weights, int64_t k) {
  Shape sizes = leading_shape(log_weights);
  sizes.push_back(k);
  const ScalarType dtype = statistics_dtype(log_weights);
  return {empty(sizes, ScalarType::Long, log_weights), empty(sizes, dtype, log_weights),
          empty(sizes, dtype, log_weights)};
}

}  // namespace winnow
