// winnow::resample on the GPU; the same ancestors, bit for bit, as on the CPU (resample_weigh.cuh
// has the weights, exact.h the decisions), in one launch. A warp or a block makes a whole
// population; a huge one has a team of blocks that are on the GPU together and meet between the
// steps.
#include "resampling/resample_arguments.h"
#include "resampling/resample_slots.cuh"

namespace winnow {
namespace {

constexpr int kThreads = 512;
constexpr int64_t kWarpParticles = 512;  // beyond this a block is faster than one warp
constexpr int64_t kBlockParticles = 2 * kBlock;

template <int kSize>
WINNOW_KERNEL(kSize)
resample_populations(ResampleLaunch call) {
  WINNOW_SHARED(uint64_t, words, kSize / kWarp);
  WINNOW_SHARED(double, doubles, kSize / kWarp);
  WINNOW_SHARED(TeamSums, sums, kSize / kWarp);
  const int64_t row = block_index() / call.team;
  const Team team = {call.team, block_index() % call.team, call.meetings + row,
                     call.tallies + row * call.team, call.rows * call.team};
  PopulationBlock<kSize> p = {call, row, team, words, doubles, sums};
  p.list_live();
  p.find_top();
  p.weigh();
  p.decide();
  report(p);
  if (!p.resampled) {
    keep_particles(p);
    return;
  }
  p.add_weights();
  Threshold threshold = {};
  switch (call.scheme) {
    case Scheme::kSystematic:
    case Scheme::kStratified:
      count_points(p);
      break;
    case Scheme::kMultinomial:
    case Scheme::kKilling:
      cumulate_weights(p);
      draw_slots(p);
      if (call.keep_slots) p.sync();
      break;
    case Scheme::kResidual:
      count_residual(p);
      if (!call.keep_slots) end_offspring(p);
      break;
    case Scheme::kSsp:
      count_pairs(p);
      if (!call.keep_slots) end_offspring(p);
      break;
    case Scheme::kOptimal:
      threshold = find_threshold(p);
      count_kept_and_drawn(p, threshold);
      break;
  }
  const bool drawn = call.scheme == Scheme::kMultinomial || call.scheme == Scheme::kKilling;
  if (call.keep_slots) {
    fill_freed_slots(p, threshold);
  } else if (!drawn) {
    fill_slots(p, threshold);
  }
  write_finished(p);
}

// ---- launchers ----

void run(ResampleLaunch call, const Tensor& like, const Stream& stream) {
  if (call.particles <= kWarpParticles) {
    launch("resample", resample_populations<kWarp>, {call.rows}, kWarp, stream, call);
    return;
  }
  const auto kernel = resample_populations<kThreads>;
  const int64_t work = call.particles > call.samples ? call.particles : call.samples;
  if (work > kBlockParticles && call.rows > 0) {
    const int64_t most = blocks_at_once("resample", kernel, kThreads) / call.rows;
    const int64_t parts = ceil_div(work, kBlock);
    call.team = parts < most ? parts : most;
  }
  if (call.team < 2) {
    call.team = 1;
    launch("resample", kernel, {call.rows}, kThreads, stream, call);
    return;
  }
  const Tensor meetings = empty({call.rows}, ScalarType::Int, like);
  const Tensor tallies = empty({2, call.rows, call.team, 2}, ScalarType::Long, like);
  call.meetings = zeroed<uint32_t>("resample", meetings, stream);
  call.tallies = global<Tally>(tallies);
  launch_together("resample", kernel, {call.rows * call.team}, kThreads, stream, call);
}

// Empty where a scheme or an option does not need it.
template <typename T>
Tensor scratch(bool needed, int64_t numbers, ScalarType dtype, const Tensor& like,
               Global<T>* pointer) {
  Tensor memory = empty({needed ? numbers : 0}, dtype, like);
  if (needed) *pointer = global<T>(memory);
  return memory;
}

Resampled resample_cuda(const Tensor& log_weights, std::string scheme,
                        std::optional<int64_t> num_samples, std::optional<double> ess_threshold,
                        bool keep_slots, std::optional<Tensor> mask, std::optional<Tensor> uniforms,
                        std::optional<Tensor> pinned, int64_t seed,
                        std::optional<Tensor> seed_tensor) {
  ResampleArguments arguments = {log_weights, scheme, num_samples, ess_threshold,
                                 keep_slots,  mask,   uniforms,    pinned};
  check_resample(&arguments, check_device);
  const Stream stream(log_weights);
  const Rows rows = as_rows(log_weights);
  const Rows mask_rows = as_rows(mask.value_or(log_weights));
  const Tensor uniform_rows = uniforms ? dense(*uniforms) : log_weights;
  const Tensor pinned_rows = pinned ? dense(*pinned) : log_weights;
  const Resampled results = empty_resampled(arguments);
  ResampleLaunch call = {};
  call.log_weights = numbers(rows.tensor);
  call.stride = rows.stride;
  call.rows = rows.count;
  call.particles = arguments.particles;
  call.samples = arguments.samples;
  if (mask) call.mask = global<const uint8_t>(mask_rows.tensor);
  call.mask_stride = mask_rows.stride;
  call.uniforms_given = uniforms.has_value();
  if (uniforms) call.uniforms = numbers(uniform_rows);
  call.uniforms_stride = arguments.uniforms_stride();
  if (pinned) call.pinned = global<const int64_t>(pinned_rows);
  if (seed_tensor) call.seed = seed_of(*seed_tensor);
  call.seed_given = seed_tensor.has_value();
  call.seed_number = static_cast<uint64_t>(seed);
  call.scheme = arguments.scheme;
  call.ess_threshold = arguments.threshold();
  call.keep_slots = keep_slots;
  call.ancestors = global<int64_t>(std::get<0>(results));
  call.offspring = global<uint64_t>(std::get<1>(results));
  call.new_log_weights = reals(std::get<2>(results));
  call.log_z = reals(std::get<3>(results));
  call.ess = reals(std::get<4>(results));
  call.resampled = global<uint8_t>(std::get<5>(results));
  call.status = global<int32_t>(std::get<6>(results));
  call.team = 1;
  call.parts = ceil_div(arguments.particles, kBlock);
  call.padded = ceil_div<int64_t>(arguments.particles, 16) * 16;
  const int64_t every = rows.count * arguments.particles;
  const Scheme s = arguments.scheme;
  const bool sums = s == Scheme::kMultinomial || s == Scheme::kKilling || s == Scheme::kResidual ||
                    s == Scheme::kSsp;
  const Tensor part = scratch(true, rows.count * call.parts * sizeof(PartSums) / 8,
                              ScalarType::Double, log_weights, &call.part);
  const Tensor weights =
      empty({rows.count * call.padded}, statistics_dtype(log_weights), log_weights);
  call.weights = reals(weights);
  const Tensor cumulative = scratch(sums, every, ScalarType::Long, log_weights, &call.cumulative);
  const Tensor ends = scratch(true, every, ScalarType::Long, log_weights, &call.ends);
  const Tensor slots = scratch(mask.has_value(), every, ScalarType::Long, log_weights, &call.slots);
  run(call, log_weights, stream);
  return results;
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("resample", TORCH_BOX(&winnow::resample_cuda));
}
