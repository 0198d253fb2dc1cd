// winnow::trace_ancestors on the GPU, in one launch: a thread follows a path through all
// generations. Ancestors are not checked on the GPU: a path that leaves its population is -1 from
// there on back.
#include "common/device.h"
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

// ---- launchers ----

Tensor trace_ancestors_cuda(const Tensor& ancestors, const Tensor& indices) {
  const TraceArguments call = check_trace(ancestors, indices, check_device);
  const Stream stream(ancestors);
  const Tensor from = torch::stable::contiguous(ancestors);
  const Tensor last = torch::stable::contiguous(indices);
  Tensor result = empty(call.result, ScalarType::Long, ancestors);
  launch("trace_ancestors", trace_paths, {ceil_div<int64_t>(indices.numel(), kThreads)}, kThreads,
         stream, global<const int64_t>(from), global<const int64_t>(last), call.steps, call.rows,
         call.particles, call.paths, global<int64_t>(result));
  return result;
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("trace_ancestors", TORCH_BOX(&winnow::trace_ancestors_cuda));
}
