// winnow::trace_ancestors and winnow::uniforms on the GPU, small operators in one unit, in one
// launch each. A thread follows a path through all generations; ancestors are not checked on the
// GPU: a path that leaves its population is -1 from there on back. Uniforms are numbers in [0, 1)
// keyed by (seed, row, element), as on the CPU.
#include "common/device.h"
#include "common/philox.h"
#include "resampling/trace_arguments.h"

namespace winnow {
namespace {

constexpr int kThreads = 256;

WINNOW_KERNEL(kThreads)
trace_paths(Global<const int64_t> ancestors, Global<const int64_t> indices, int64_t steps,
            int64_t rows, int64_t particles, int64_t paths, Global<int64_t> result) {
  const int64_t item = block_index() * kThreads + thread_index();
  if (item >= rows * paths) return;
  const int64_t row = item / paths;
  int64_t at = indices[item];
  for (int64_t t = steps;; --t) {
    if (at < 0 || at >= particles) at = -1;
    result[t * rows * paths + item] = at;
    if (t == 0) return;
    if (at >= 0) at = ancestors[((t - 1) * rows + row) * particles + at];
  }
}

WINNOW_KERNEL(kThreads)
draw_uniforms(Seed seed, int64_t count, int64_t total, Global<double> result) {
  const int64_t item = block_index() * kThreads + thread_index();
  if (item >= total) return;
  const uint64_t bits = philox_bits(seed.get(), static_cast<uint64_t>(item / count),
                                    static_cast<uint64_t>(item % count));
  result[item] = static_cast<double>(bits >> 11) * 0x1p-53;
}

// ---- launchers ----

Tensor trace_ancestors_cuda(const Tensor& ancestors, const Tensor& indices) {
  const TraceArguments call = check_trace(ancestors, indices, check_device);
  const Stream stream(ancestors);
  const Tensor from = dense(ancestors);
  const Tensor last = dense(indices);
  Tensor result = empty(call.result, ScalarType::Long, ancestors);
  launch("trace_ancestors", trace_paths, {ceil_div<int64_t>(indices.numel(), kThreads)}, kThreads,
         stream, global<const int64_t>(from), global<const int64_t>(last), call.steps, call.rows,
         call.particles, call.paths, global<int64_t>(result));
  return result;
}

Tensor uniforms_cuda(const Tensor& seed, int64_t rows, int64_t count) {
  check_device("seed", seed);
  const Stream stream(seed);
  check_uniforms(rows, count);
  Tensor result = empty({rows, count}, ScalarType::Double, seed);
  launch("uniforms", draw_uniforms, {ceil_div<int64_t>(rows * count, kThreads)}, kThreads, stream,
         seed_of(seed), count, rows * count, global<double>(result));
  return result;
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("trace_ancestors", TORCH_BOX(&winnow::trace_ancestors_cuda));
  m.impl("uniforms", TORCH_BOX(&winnow::uniforms_cuda));
}
