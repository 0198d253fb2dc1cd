// winnow::resample on the CPU: checks, allocation, and the split of the work over threads. Many
// populations are dealt out whole; a huge one is worked on block by block, step by step.
#ifdef __linux__
#include <sys/mman.h>
#endif
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>

#include "common/parallel.h"
#include "resampling/resample_arguments.h"
#include "resampling/resample_simd.h"

namespace winnow {
namespace {

// Where the indices can be read they are checked.
Tensor check_indices(const Tensor& pinned, const ResampleArguments& a) {
  const Tensor result = dense(pinned);
  const auto* index = static_cast<const int64_t*>(result.data_ptr());
  const int64_t most = a.particles < a.samples ? a.particles : a.samples;
  for (int64_t i = 0; i < result.numel(); ++i) {
    WINNOW_CHECK(index[i] >= 0 && index[i] < most,
                 "pinned: expected a particle below K = ", a.particles, " and M = ", a.samples,
                 ", got ", index[i]);
  }
  return result;
}

// Scratch memory of one thread; a small population's lies on the stack. A huge one's is searched at
// random, and in pages of 4 KB most of these accesses would wait for an address translation.
class ScratchMemory {
 public:
  explicit ScratchMemory(int64_t bytes) {
    if (bytes <= static_cast<int64_t>(sizeof small_)) return;
    const size_t alignment = bytes < 2 * kHugePage ? 64 : kHugePage;
    const size_t size = (static_cast<size_t>(bytes) + alignment - 1) / alignment * alignment;
    large_.reset(std::aligned_alloc(alignment, size));
    if (!large_) throw std::bad_alloc();
#ifdef __linux__
    if (alignment == kHugePage) madvise(large_.get(), size, MADV_HUGEPAGE);
#endif
  }
  void* data() { return large_ ? large_.get() : small_; }

 private:
  static constexpr int64_t kHugePage = int64_t{1} << 21;
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  alignas(64) char small_[8192];
  std::unique_ptr<void, Free> large_;
};

void resample_whole_rows(const ResampleCall& call) {
  const auto loop = WINNOW_SIMD(resample_rows);
  const int64_t bytes = resample_scratch(call).bytes;
  const int64_t grain =
      1 + 8192 / (call.particles + call.samples + 16);  // about 20 µs for a thread
  parallel_for(0, call.rows, grain, [&](int64_t begin, int64_t end) {
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
      parallel_for(0, population.items, 1,
                   [&](int64_t begin, int64_t end) { step(call, which, begin, end, memory); });
      settle(call, which, memory);
    }
  }
}

Resampled resample(const Tensor& log_weights, const std::string& scheme,
                   std::optional<int64_t> num_samples, std::optional<double> ess_threshold,
                   bool keep_slots, std::optional<Tensor> mask, std::optional<Tensor> uniforms,
                   std::optional<Tensor> pinned, int64_t seed,
                   const std::optional<Tensor>& seed_tensor) {
  ResampleArguments arguments = {log_weights, scheme, num_samples, ess_threshold,
                                 keep_slots,  mask,   uniforms,    pinned};
  check_resample(&arguments, check_cpu);
  const int64_t particles = arguments.particles;
  const Rows rows = as_rows(log_weights);
  ResampleCall call = {};
  call.scheme = arguments.scheme;
  call.ess_threshold = arguments.threshold();
  std::optional<Rows> mask_rows;
  if (mask.has_value()) {
    mask_rows = as_rows(*mask);
    call.mask = mask_rows->tensor.data_ptr();
    call.mask_stride = mask_rows->stride;
  }
  std::optional<Tensor> uniform_rows;
  if (uniforms.has_value()) {
    uniform_rows = dense(*uniforms);
    call.uniforms = uniform_rows->data_ptr();
    call.uniforms_type = element_type(*uniform_rows);
    call.uniforms_stride = arguments.uniforms_stride();
  }
  std::optional<Tensor> pinned_rows;
  if (pinned.has_value()) {
    pinned_rows = check_indices(*pinned, arguments);
    call.pinned = static_cast<const int64_t*>(pinned_rows->data_ptr());
  }
  const Resampled results = empty_resampled(arguments);
  const auto& [ancestors, offspring, new_log_weights, log_z, ess, resampled, status] = results;

  call.log_weights = rows.tensor.data_ptr();
  call.type = element_type(log_weights);
  call.stride = rows.stride;
  call.rows = rows.count;
  call.particles = particles;
  call.samples = arguments.samples;
  call.seed = seed_tensor ? host_seed(*seed_tensor) : static_cast<uint64_t>(seed);
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
  return results;
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("resample", TORCH_BOX(&winnow::resample));
}
