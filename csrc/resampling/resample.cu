// winnow::resample on the GPU; the same ancestors, bit for bit, as on the CPU (resample_weigh.cuh
// has the weights, exact.h the decisions). A warp or a block makes a whole population in one
// launch. A huge population's parts get a block each and the steps a launch each, for the schemes
// that need no pass of their own.
#include "resampling/resample_arguments.h"
#include "resampling/resample_schemes.cuh"

namespace winnow {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kWarpParticles = 512;  // beyond this a block is faster than one warp
constexpr int64_t kWholeParticles = 2 * kBlock;

// ---- results ----

// A population that is not resampled keeps its particles; one without any weight comes here with
// another number of samples, and then in turns.
template <typename Block>
WINNOW_DEVICE void keep_offspring(const Block& p, int64_t begin, int64_t end) {
  const int64_t particles = p.call.particles;
  const int64_t samples = p.call.samples;
  for (int64_t k = begin + thread_index(); k < end; k += p.kSize) {
    p.offspring()[k] =
        static_cast<uint64_t>(samples / particles + (k < samples % particles ? 1 : 0));
  }
}

template <typename Block>
WINNOW_DEVICE void keep_slots_as_they_are(const Block& p, int64_t begin, int64_t end) {
  using Real = typename Block::Real;
  const int64_t particles = p.call.particles;
  for (int64_t j = begin + thread_index(); j < end; j += p.kSize) {
    const int64_t at = p.row * p.call.samples + j;
    p.call.ancestors[at] = j < particles ? j : j % particles;
    p.call.new_log_weights[at] =
        j < particles ? carried(p.log_weight(j)) : -std::numeric_limits<Real>::infinity();
  }
}

template <typename Block>
WINNOW_DEVICE void write_slot(const Block& p, int64_t j, int64_t ancestor,
                              typename Block::Real log_weight) {
  const int64_t at = p.row * p.call.samples + p.slot(j);
  p.call.ancestors[at] = p.slot(ancestor);
  p.call.new_log_weights[at] = log_weight;
}

// The finished: in their slot, their weight divided by what the live ones' weights were divided by.
template <typename Block>
WINNOW_DEVICE void write_finished(const Block& p) {
  using Real = typename Block::Real;
  for (int64_t k = thread_index(); k < p.call.particles && p.call.mask; k += p.kSize) {
    const uint8_t set = p.call.mask[p.row * p.call.mask_stride + k];
    if (set != 0) continue;
    const int64_t at = p.row * p.call.particles + k;
    const double lowered = static_cast<double>(carried(p.log_weight(k))) - p.log_z;
    p.call.ancestors[at] = k;
    p.call.offspring[at] = 1;
    // Infinite on both sides: finished and live share the mass.
    p.call.new_log_weights[at] = static_cast<Real>(lowered == lowered ? lowered : 0.0);
  }
}

template <typename Block>
WINNOW_DEVICE void report(const Block& p) {
  using Real = typename Block::Real;
  if (thread_index() != 0) return;
  p.call.log_z[p.row] = static_cast<Real>(p.log_z);
  p.call.ess[p.row] = static_cast<Real>(p.ess);
  p.call.resampled[p.row] = p.resampled ? 1 : 0;
  p.call.status[p.row] = p.status;
}

template <typename Block>
WINNOW_DEVICE typename Block::Real optimal_log_weight(const Block& p, const Threshold& t,
                                                      int64_t k) {
  using Real = typename Block::Real;
  const auto samples = static_cast<double>(p.count);
  if (p.fixed_weight(k) < t.least) {
    return static_cast<Real>(
        log_number(samples * (static_cast<double>(t.drawn_total) / static_cast<double>(t.drawn)) /
                   static_cast<double>(p.total)));
  }
  const double relative = static_cast<double>(carried(p.log_weight(p.slot(k)))) - p.top;
  double log_weight =
      (relative == relative ? relative : 0.0) + (log_number(samples) - log_number(p.sum));
  const uint64_t copies = p.offspring()[p.slot(k)];
  if (copies > 1) log_weight -= log_number(static_cast<double>(copies));
  return static_cast<Real>(log_weight);
}

// Slots [begin, end) from the ends, or from draws, which are counted.
template <typename Block>
WINNOW_DEVICE void fill_slots(const Block& p, const Threshold& t, int64_t begin, int64_t end) {
  const Scheme scheme = p.call.scheme;
  const Global<const int64_t> ends = p.ends();
  const bool draws = scheme == Scheme::kMultinomial || scheme == Scheme::kKilling;
  const int64_t right = draws ? 0 : rotation(p);
  for (int64_t j = begin + thread_index(); j < end; j += p.kSize) {
    int64_t k;
    if (draws) {
      k = draw_slot(p, j);
      atomic_add(p.offspring() + p.slot(k), uint64_t{1});
    } else {
      const int64_t ascending = j < right ? j - right + p.count : j - right;
      k = first_above<int64_t>(ends, p.live, ascending);
    }
    write_slot(p, j, k, scheme == Scheme::kOptimal ? optimal_log_weight(p, t, k) : 0);
  }
}

// Survivors stay, and what they have beyond one fills the freed slots.
template <typename Block>
WINNOW_DEVICE void fill_freed_slots(const Block& p, const Threshold& t) {
  end_copies(p, [](uint64_t offspring) { return offspring > 0 ? offspring - 1 : 0; });
  const Global<const int64_t> ends = p.ends();
  int64_t before = 0;
  for (int64_t first = 0; first < p.live; first += p.kSize) {
    const int64_t k = first + thread_index();
    uint64_t copies = 1;
    if (k < p.live) copies = p.offspring()[p.slot(k)];
    uint64_t all;
    const int64_t rank = before + static_cast<int64_t>(p.sum_before(copies == 0 ? 1 : 0, &all));
    before += static_cast<int64_t>(all);
    if (k >= p.live) continue;
    const int64_t ancestor = copies > 0 ? k : first_above<int64_t>(ends, p.live, rank);
    write_slot(p, k, ancestor,
               p.call.scheme == Scheme::kOptimal ? optimal_log_weight(p, t, ancestor) : 0);
  }
}

// ---- kernels ----

template <typename T, int kSize>
WINNOW_KERNEL(kSize)
whole_populations(ResampleLaunch<T> call) {
  WINNOW_SHARED(uint64_t, words, kSize / kWarp);
  WINNOW_SHARED(double, numbers, kSize / kWarp);
  PopulationBlock<T, kSize> p = {call, block_index(), words, numbers};
  p.list_live();
  block_sync();
  for (int64_t b = 0; b < p.parts(); ++b) p.find_top(b);
  block_sync();
  p.read_tops();
  for (int64_t b = 0; b < p.parts(); ++b) p.weigh(b);
  block_sync();
  p.decide();
  report(p);
  if (!p.resampled) {
    keep_offspring(p, 0, call.particles);
    keep_slots_as_they_are(p, 0, call.samples);
    return;
  }
  for (int64_t b = 0; b < p.parts(); ++b) p.add_up(b);
  block_sync();
  p.read_totals(0);
  Threshold threshold = {};
  switch (call.scheme) {
    case Scheme::kOptimal:
      threshold = find_threshold(p);
      count_kept_and_drawn(p, threshold);
      break;
    case Scheme::kResidual:
      p.decide_by_pinned();
      count_residual(p);
      end_copies(p, [](uint64_t offspring) { return offspring; });
      break;
    case Scheme::kSsp:
      p.decide_by_pinned();
      count_pairs(p);
      end_copies(p, [](uint64_t offspring) { return offspring; });
      break;
    case Scheme::kMultinomial:
    case Scheme::kKilling:
      p.decide_by_pinned();
      for (int64_t b = 0; b < p.parts(); ++b) cumulate_part(p, b, p.read_totals(b));
      block_sync();
      break;
    case Scheme::kSystematic:
    case Scheme::kStratified:
      p.decide_by_pinned();
      for (int64_t b = 0; b < p.parts(); ++b) count_part(p, b, p.read_totals(b));
      block_sync();
      break;
  }
  const bool draws = call.scheme == Scheme::kMultinomial || call.scheme == Scheme::kKilling;
  if (!call.keep_slots || draws) fill_slots(p, threshold, 0, p.count);
  if (call.keep_slots) {
    block_sync();
    fill_freed_slots(p, threshold);
  }
  write_finished(p);
}

// The steps of huge populations: block (row, part), and what earlier steps found read again.
enum class Step { kTop, kWeigh, kTotal, kCount, kSlots };

template <typename T, Step kStep>
WINNOW_KERNEL(kThreads)
population_parts(ResampleLaunch<T> call, int64_t parts) {
  WINNOW_SHARED(uint64_t, words, kThreads / kWarp);
  WINNOW_SHARED(double, numbers, kThreads / kWarp);
  PopulationBlock<T, kThreads> p = {call, block_index() / parts, words, numbers};
  const int64_t b = block_index() % parts;
  p.list_live();
  if constexpr (kStep == Step::kTop) {
    p.find_top(b);
  } else {
    p.read_tops();
    if constexpr (kStep == Step::kWeigh) {
      p.weigh(b);
      return;
    }
    p.decide();
    if constexpr (kStep == Step::kTotal) {
      if (b == 0) report(p);
      p.add_up(b);
      return;
    }
    const uint64_t before = p.read_totals(b);
    if (p.resampled) p.decide_by_pinned();
    if constexpr (kStep == Step::kCount) {
      if (!p.resampled) {
        keep_offspring(p, b * kBlock, p.part_end(b));
      } else if (call.scheme == Scheme::kSystematic || call.scheme == Scheme::kStratified) {
        count_part(p, b, before);
      } else {
        cumulate_part(p, b, before);
      }
    } else {
      const int64_t begin = b * kBlock;
      const int64_t end = begin + kBlock < call.samples ? begin + kBlock : call.samples;
      if (p.resampled) {
        fill_slots(p, Threshold{}, begin, end);
      } else {
        keep_slots_as_they_are(p, begin, end);
      }
    }
  }
}

// ---- launchers ----

template <typename T>
void run(const ResampleLaunch<T>& call, int64_t rows, const Stream& stream) {
  const bool flat = call.scheme == Scheme::kSystematic || call.scheme == Scheme::kStratified ||
                    call.scheme == Scheme::kMultinomial || call.scheme == Scheme::kKilling;
  if (call.particles <= kWarpParticles) {
    launch("resample", whole_populations<T, kWarp>, {rows}, kWarp, stream, call);
  } else if (call.particles <= kWholeParticles || call.mask || call.keep_slots || !flat) {
    launch("resample", whole_populations<T, kThreads>, {rows}, kThreads, stream, call);
  } else {
    const auto step = [&](auto kernel, int64_t parts) {
      launch("resample", kernel, {rows * parts}, kThreads, stream, call, parts);
    };
    step(population_parts<T, Step::kTop>, call.parts);
    step(population_parts<T, Step::kWeigh>, call.parts);
    step(population_parts<T, Step::kTotal>, call.parts);
    step(population_parts<T, Step::kCount>, call.parts);
    step(population_parts<T, Step::kSlots>, ceil_div(call.samples, kBlock));
  }
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
  check_device("log_weights", log_weights);
  if (mask) check_device("mask", *mask);
  if (uniforms) check_device("uniforms", *uniforms);
  if (pinned) check_device("pinned", *pinned);
  ResampleArguments arguments = {log_weights, scheme, num_samples, ess_threshold,
                                 keep_slots,  mask,   uniforms,    pinned};
  check_resample(&arguments);
  const Stream stream(log_weights);
  const Rows rows = as_rows(log_weights);
  const Rows mask_rows = as_rows(mask.value_or(log_weights));
  const Tensor uniform_rows = torch::stable::contiguous(uniforms.value_or(log_weights));
  const Tensor pinned_rows = torch::stable::contiguous(pinned.value_or(log_weights));
  const Resampled results = empty_resampled(arguments);
  dispatch_floating(log_weights, [&](auto zero) {
    using T = decltype(zero);
    using Real = typename ResampleLaunch<T>::Real;
    ResampleLaunch<T> call = {};
    call.log_weights = global<const T>(rows.tensor);
    call.stride = rows.stride;
    call.particles = arguments.particles;
    call.samples = arguments.samples;
    if (mask) call.mask = global<const uint8_t>(mask_rows.tensor);
    call.mask_stride = mask_rows.stride;
    if (uniforms && uniform_rows.scalar_type() == ScalarType::Float) {
      call.uniforms = global<const float>(uniform_rows);
    } else if (uniforms) {
      call.wide_uniforms = global<const double>(uniform_rows);
    }
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
    call.new_log_weights = global<Real>(std::get<2>(results));
    call.log_z = global<Real>(std::get<3>(results));
    call.ess = global<Real>(std::get<4>(results));
    call.resampled = global<uint8_t>(std::get<5>(results));
    call.status = global<int32_t>(std::get<6>(results));
    call.parts = ceil_div(arguments.particles, kBlock);
    call.padded = ceil_div<int64_t>(arguments.particles, 16) * 16;
    const int64_t numbers = rows.count * arguments.particles;
    const Scheme s = arguments.scheme;
    const bool sums = s == Scheme::kMultinomial || s == Scheme::kKilling ||
                      s == Scheme::kResidual || s == Scheme::kSsp;
    const Tensor part = scratch(true, rows.count * call.parts * sizeof(PartSums) / 8,
                                ScalarType::Double, log_weights, &call.part);
    const Tensor weights = scratch(true, rows.count * call.padded, statistics_dtype(log_weights),
                                   log_weights, &call.weights);
    const Tensor cumulative =
        scratch(sums, numbers, ScalarType::Long, log_weights, &call.cumulative);
    const Tensor ends = scratch(true, numbers, ScalarType::Long, log_weights, &call.ends);
    const Tensor slots =
        scratch(mask.has_value(), numbers, ScalarType::Long, log_weights, &call.slots);
    run(call, rows.count, stream);
  });
  return results;
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("resample", TORCH_BOX(&winnow::resample_cuda));
}
