// What next_temperature and conditional_effective_sample_size accept, on the CPU and on the GPU.
#pragma once

#include <optional>

#include "resampling/populations.h"

namespace winnow {

template <typename OnDevice>
void check_same(const char* argument, const Tensor& tensor, const char* other,
                const Tensor& expected, const OnDevice& check_device) {
  check_device(argument, tensor);
  check_dtype(argument, tensor, expected.scalar_type());
  WINNOW_CHECK(shape(tensor) == shape(expected), argument, ": expected the shape of ", other, " ",
               shape_of(expected), ", got ", shape_of(tensor));
}

template <typename OnDevice>
void check_tempering(const Tensor& log_likelihood, const Tensor& beta, double target_ess,
                     double max_beta, const std::optional<Tensor>& log_weights,
                     const OnDevice& check_device) {
  check_populations("log_likelihood", log_likelihood, check_device);
  check_device("beta", beta);
  const ScalarType dtype = beta.scalar_type();
  WINNOW_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
               "beta: expected float32 or float64, got ", name_of(dtype));
  WINNOW_CHECK(shape(beta) == leading_shape(log_likelihood),
               "beta: expected a number for each population of log_likelihood ",
               shape_of(log_likelihood), ", got shape ", shape_of(beta));
  WINNOW_CHECK(target_ess > 0.0 && target_ess <= 1.0,
               "target_ess: expected a share in (0, 1], got ", target_ess);
  WINNOW_CHECK(max_beta - max_beta == 0.0, "max_beta: expected a finite number, got ", max_beta);
  if (log_weights.has_value()) {
    check_same("log_weights", *log_weights, "log_likelihood", log_likelihood, check_device);
  }
}

}  // namespace winnow
