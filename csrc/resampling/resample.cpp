// winnow::resample on the CPU: checks, allocation, and the split of the work over threads. Many
// populations are dealt out whole; a huge one is worked on block by block, step by step.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>

#include "common/checks.h"
#include "common/tensors.h"
#include "resampling/resample_simd.h"

namespace winnow {
namespace {

using Resampled = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kMostParticles = int64_t{1} << 31;
constexpr int64_t kMostSamples = int64_t{1} << 40;

Scheme scheme_of(const std::string& name) {
  if (name == "systematic") return Scheme::kSystematic;
  if (name == "stratified") return Scheme::kStratified;
  if (name == "multinomial") return Scheme::kMultinomial;
  if (name == "residual") return Scheme::kResidual;
  if (name == "ssp") return Scheme::kSsp;
  if (name == "killing") return Scheme::kKilling;
  if (name == "optimal") return Scheme::kOptimal;
  fail(
      "scheme: expected systematic, stratified, residual, ssp, killing, optimal or multinomial, "
      "got "
      "'",
      name, "'");
}

// One uniform per population, or one per sample.
Tensor check_uniforms(const Tensor& uniforms, const std::string& scheme, const Tensor& log_weights,
                      int64_t samples) {
  check_cpu("uniforms", uniforms);
  Shape expected = leading_shape(log_weights);
  if (scheme == "stratified" || scheme == "multinomial") {
    expected.push_back(samples);
  } else {
    WINNOW_CHECK(scheme == "systematic",
                 "uniforms: accepted for systematic, stratified and multinomial, got scheme='",
                 scheme, "'");
  }
  const ScalarType dtype = uniforms.scalar_type();
  WINNOW_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
               "uniforms: expected float32 or float64, got ", name_of(dtype));
  WINNOW_CHECK(shape(uniforms) == expected, "uniforms: expected ",
               scheme == "systematic" ? "(...)" : "(..., M)", " for log_weights of shape ",
               shape_of(log_weights), " and M = ", samples, ", got shape ", shape_of(uniforms));
  return torch::stable::contiguous(uniforms);
}

// One particle per population.
Tensor check_pinned(const Tensor& pinned, const Tensor& log_weights, int64_t samples) {
  check_cpu("pinned", pinned);
  check_dtype("pinned", pinned, ScalarType::Long);
  WINNOW_CHECK(shape(pinned) == leading_shape(log_weights),
               "pinned: expected one particle per population (...) for log_weights of shape ",
               shape_of(log_weights), ", got shape ", shape_of(pinned));
  const Tensor result = torch::stable::contiguous(pinned);
  const auto* index = static_cast<const int64_t*>(result.data_ptr());
  const int64_t particles = log_weights.size(log_weights.dim() - 1);
  const int64_t most = particles < samples ? particles : samples;
  for (int64_t i = 0; i < result.numel(); ++i) {
    WINNOW_CHECK(index[i] >= 0 && index[i] < most,
                 "pinned: expected a particle below K = ", particles, " and M = ", samples,
                 ", got ", index[i]);
  }
  return result;
}

uint64_t seed_of(int64_t seed, const std::optional<Tensor>& seed_tensor) {
  if (!seed_tensor.has_value()) return static_cast<uint64_t>(seed);
  check_cpu("seed", *seed_tensor);
  check_dtype("seed", *seed_tensor, ScalarType::Long);
  WINNOW_CHECK(seed_tensor->numel() == 1 && seed_tensor->dim() == 0,
               "seed: expected a 0-dim tensor, got shape ", shape_of(*seed_tensor));
  return static_cast<uint64_t>(*static_cast<const int64_t*>(seed_tensor->data_ptr()));
}

// Scratch memory of one thread; a small population's lies on the stack.
class ScratchMemory {
 public:
  explicit ScratchMemory(int64_t bytes) {
    if (bytes > static_cast<int64_t>(sizeof small_)) {
      large_.reset(new char[static_cast<size_t>(bytes) + 63]);
    }
  }
  void* data() {
    if (!large_) return small_;
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(large_.get()) + 63) &
                                   ~uintptr_t{63});
  }

 private:
  alignas(64) char small_[8192];
  std::unique_ptr<char[]> large_;
};

void resample_whole_rows(const ResampleCall& call) {
  const auto loop = WINNOW_SIMD(resample_rows);
  const int64_t bytes = resample_scratch(call).bytes;
  const int64_t grain =
      1 + 8192 / (call.particles + call.samples + 16);  // about 20 µs for a thread
  torch::stable::parallel_for(0, call.rows, grain, [&](int64_t begin, int64_t end) {
    ScratchMemory scratch(bytes);
    loop(call, begin, end, scratch.data());
  });
}

void resample_in_blocks(ResampleCall call) {
  call.shared = true;
  const auto start = WINNOW_SIMD(resample_start);
  const auto step = WINNOW_SIMD(resample_step);
  const auto settle = WINNOW_SIMD(resample_settle);
  ScratchMemory scratch(resample_scratch(call).bytes);
  void* memory = scratch.data();
  const auto& population = *static_cast<const Population*>(memory);
  for (int64_t row = 0; row < call.rows; ++row) {
    start(call, row, memory);
    for (int which = 0; which < kSteps; ++which) {
      torch::stable::parallel_for(0, population.items, 1, [&](int64_t begin, int64_t end) {
        step(call, which, begin, end, memory);
      });
      settle(call, which, memory);
    }
  }
}

Resampled resample(const Tensor& log_weights, std::string scheme,
                   std::optional<int64_t> num_samples, std::optional<double> ess_threshold,
                   bool keep_slots, std::optional<Tensor> mask, std::optional<Tensor> uniforms,
                   std::optional<Tensor> pinned, int64_t seed, std::optional<Tensor> seed_tensor) {
  check_floating("log_weights", log_weights);
  WINNOW_CHECK(log_weights.dim() >= 1, "log_weights: expected (..., K), got a scalar");
  const Rows rows = as_rows(log_weights);
  const int64_t particles = rows.length;
  const int64_t samples = num_samples.value_or(particles);
  WINNOW_CHECK(particles < kMostParticles, "log_weights: expected fewer than 2^31 particles, got ",
               particles);
  WINNOW_CHECK(samples >= 0 && samples <= kMostSamples, "num_samples: expected 0 to 2^40, got ",
               samples);
  WINNOW_CHECK(particles > 0 || samples == 0,
               "num_samples: expected 0 for a population of no "
               "particles, got ",
               samples);

  ResampleCall call = {};
  call.scheme = scheme_of(scheme);
  call.ess_threshold = ess_threshold.value_or(-1.0);
  if (ess_threshold.has_value()) {
    WINNOW_CHECK(*ess_threshold > 0.0 && *ess_threshold <= 1.0,
                 "ess_threshold: expected a share in (0, 1], got ", *ess_threshold);
    WINNOW_CHECK(
        samples == particles, "num_samples: expected K = ", particles,
        " with ess_threshold (a population that is not resampled keeps its particles), got ",
        samples);
  }
  WINNOW_CHECK(!keep_slots || samples == particles, "num_samples: expected K = ", particles,
               " with keep_slots, got ", samples);

  WINNOW_CHECK(call.scheme != Scheme::kKilling || samples == particles,
               "num_samples: expected K = ", particles, " with scheme='killing', got ", samples);

  Rows mask_rows = {log_weights, 0, 0, 0};
  if (mask.has_value()) {
    check_cpu("mask", *mask);
    check_dtype("mask", *mask, ScalarType::Bool);
    WINNOW_CHECK(shape(*mask) == shape(log_weights), "mask: expected the shape of log_weights ",
                 shape_of(log_weights), ", got ", shape_of(*mask));
    WINNOW_CHECK(samples == particles, "num_samples: expected K = ", particles, " with mask, got ",
                 samples);
    mask_rows = as_rows(*mask);
    call.mask = mask_rows.tensor.data_ptr();
    call.mask_stride = mask_rows.stride;
  }
  Tensor uniform_rows = log_weights;
  if (uniforms.has_value()) {
    uniform_rows = check_uniforms(*uniforms, scheme, log_weights, samples);
    call.uniforms = uniform_rows.data_ptr();
    call.uniforms_type = element_type(uniform_rows);
    call.uniforms_stride = call.scheme == Scheme::kSystematic ? 1 : samples;
  }

  Tensor pinned_rows = log_weights;
  if (pinned.has_value()) {
    WINNOW_CHECK(!uniforms.has_value(), "uniforms: not accepted with pinned, which decides some");
    pinned_rows = check_pinned(*pinned, log_weights, samples);
    call.pinned = static_cast<const int64_t*>(pinned_rows.data_ptr());
  }

  Shape population = leading_shape(log_weights);
  Shape sampled = population;
  sampled.push_back(samples);
  const ScalarType dtype = statistics_dtype(log_weights);
  Tensor ancestors = empty(sampled, ScalarType::Long, log_weights);
  Tensor offspring = empty(shape(log_weights), ScalarType::Long, log_weights);
  Tensor new_log_weights = empty(sampled, dtype, log_weights);
  Tensor log_z = empty(population, dtype, log_weights);
  Tensor ess = empty(population, dtype, log_weights);
  Tensor resampled = empty(population, ScalarType::Bool, log_weights);
  Tensor status = empty(population, ScalarType::Int, log_weights);

  call.log_weights = rows.tensor.data_ptr();
  call.type = element_type(log_weights);
  call.stride = rows.stride;
  call.rows = rows.count;
  call.particles = particles;
  call.samples = samples;
  call.seed = seed_of(seed, seed_tensor);
  call.keep_slots = keep_slots;
  call.ancestors = static_cast<int64_t*>(ancestors.data_ptr());
  call.offspring = static_cast<int64_t*>(offspring.data_ptr());
  call.new_log_weights = new_log_weights.data_ptr();
  call.log_z = log_z.data_ptr();
  call.ess = ess.data_ptr();
  call.resampled = static_cast<bool*>(resampled.data_ptr());
  call.status = static_cast<int32_t*>(status.data_ptr());

  const bool huge = particles > kBlock && call.mask == nullptr &&
                    rows.count < static_cast<int64_t>(torch::stable::get_num_threads());
  if (huge) {
    resample_in_blocks(call);
  } else {
    resample_whole_rows(call);
  }
  return {ancestors, offspring, new_log_weights, log_z, ess, resampled, status};
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("resample", TORCH_BOX(&winnow::resample));
}
