// What `resample` accepts, on the CPU and on the GPU: checks that need no data, and the tensors
// that it returns.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "resampling/populations.h"
#include "resampling/scheme.h"

namespace winnow {

using Resampled = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct ResampleArguments {
  const Tensor& log_weights;
  const std::string& scheme_name;
  std::optional<int64_t> num_samples;
  std::optional<double> ess_threshold;
  bool keep_slots;
  const std::optional<Tensor>& mask;
  const std::optional<Tensor>& uniforms;
  const std::optional<Tensor>& pinned;
  // Found by the checks.
  Scheme scheme = Scheme::kSystematic;
  int64_t particles = 0;
  int64_t samples = 0;

  double threshold() const { return ess_threshold.value_or(-1.0); }  // negative: always
  int64_t uniforms_stride() const { return scheme == Scheme::kSystematic ? 1 : samples; }
};

inline Scheme scheme_of(const std::string& name) {
  if (name == "systematic") return Scheme::kSystematic;
  if (name == "stratified") return Scheme::kStratified;
  if (name == "multinomial") return Scheme::kMultinomial;
  if (name == "residual") return Scheme::kResidual;
  if (name == "ssp") return Scheme::kSsp;
  if (name == "killing") return Scheme::kKilling;
  if (name == "optimal") return Scheme::kOptimal;
  fail("scheme: expected systematic, stratified, residual, ssp, killing, optimal or multinomial",
       ", got '", name, "'");
}

// One uniform per population, or one per sample.
inline void check_uniforms(const ResampleArguments& a) {
  const Tensor& uniforms = *a.uniforms;
  const bool one = a.scheme == Scheme::kSystematic;
  Shape expected = leading_shape(a.log_weights);
  if (!one) expected.push_back(a.samples);
  WINNOW_CHECK(one || a.scheme == Scheme::kStratified || a.scheme == Scheme::kMultinomial,
               "uniforms: accepted for systematic, stratified and multinomial, got scheme='",
               a.scheme_name, "'");
  WINNOW_CHECK(!a.pinned.has_value(),
               "uniforms: expected None with pinned, which decides some, got a tensor");
  const ScalarType dtype = uniforms.scalar_type();
  WINNOW_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
               "uniforms: expected float32 or float64, got ", name_of(dtype));
  WINNOW_CHECK(shape(uniforms) == expected, "uniforms: expected ", one ? "(...)" : "(..., M)",
               " for log_weights of shape ", shape_of(a.log_weights), " and M = ", a.samples,
               ", got shape ", shape_of(uniforms));
}

template <typename OnDevice>
void check_resample(ResampleArguments* arguments, const OnDevice& check_device) {
  ResampleArguments& a = *arguments;
  check_populations("log_weights", a.log_weights, check_device);
  if (a.mask) check_device("mask", *a.mask);
  if (a.uniforms) check_device("uniforms", *a.uniforms);
  if (a.pinned) check_device("pinned", *a.pinned);
  const int64_t particles = a.particles = a.log_weights.size(a.log_weights.dim() - 1);
  const int64_t samples = a.samples = a.num_samples.value_or(particles);
  WINNOW_CHECK(particles < int64_t{1} << 31,
               "log_weights: expected fewer than 2^31 particles, got ", particles);
  WINNOW_CHECK(samples >= 0 && samples <= int64_t{1} << 40, "num_samples: expected 0 to 2^40, got ",
               samples);
  WINNOW_CHECK(particles > 0 || samples == 0,
               "num_samples: expected 0 for a population of no particles, got ", samples);
  a.scheme = scheme_of(a.scheme_name);

  // M = K where slots and particles belong together.
  const auto all = [&](bool needed, const char* why) {
    WINNOW_CHECK(!needed || samples == particles, "num_samples: expected K = ", particles, why,
                 ", got ", samples);
  };
  if (a.ess_threshold.has_value()) {
    WINNOW_CHECK(*a.ess_threshold > 0.0 && *a.ess_threshold <= 1.0,
                 "ess_threshold: expected a share in (0, 1], got ", *a.ess_threshold);
  }
  all(a.ess_threshold.has_value(),
      " with ess_threshold (a population that is not resampled keeps its particles)");
  all(a.keep_slots, " with keep_slots");
  all(a.scheme == Scheme::kKilling, " with scheme='killing'");
  if (a.mask.has_value()) {
    check_dtype("mask", *a.mask, ScalarType::Bool);
    WINNOW_CHECK(shape(*a.mask) == shape(a.log_weights), "mask: expected the shape of log_weights ",
                 shape_of(a.log_weights), ", got ", shape_of(*a.mask));
    all(true, " with mask");
  }
  if (a.uniforms.has_value()) check_uniforms(a);
  if (a.pinned.has_value()) {
    check_dtype("pinned", *a.pinned, ScalarType::Long);
    WINNOW_CHECK(shape(*a.pinned) == leading_shape(a.log_weights),
                 "pinned: expected one particle per population (...) for log_weights of shape ",
                 shape_of(a.log_weights), ", got shape ", shape_of(*a.pinned));
  }
}

inline Resampled empty_resampled(const ResampleArguments& a) {
  const Shape population = leading_shape(a.log_weights);
  Shape sampled = population;
  sampled.push_back(a.samples);
  const ScalarType dtype = statistics_dtype(a.log_weights);
  const Tensor& like = a.log_weights;
  return {empty(sampled, ScalarType::Long, like),
          empty(shape(a.log_weights), ScalarType::Long, like),
          empty(sampled, dtype, like),
          empty(population, dtype, like),
          empty(population, dtype, like),
          empty(population, ScalarType::Bool, like),
          empty(population, ScalarType::Int, like)};
}

}  // namespace winnow
