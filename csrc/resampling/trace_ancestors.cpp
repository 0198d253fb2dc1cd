// winnow::trace_ancestors on the CPU: from the last generation back to the first, population by
// population.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/parallel.h"
#include "resampling/trace_arguments.h"

namespace winnow {
namespace {

// Indices into [0, particles), or the argument is refused: a walk must not leave its memory.
void check_indices(const char* argument, const Tensor& tensor, int64_t particles) {
  const auto* index = static_cast<const int64_t*>(tensor.data_ptr());
  for (int64_t i = 0; i < tensor.numel(); ++i) {
    WINNOW_CHECK(index[i] >= 0 && index[i] < particles, argument, ": expected indices in [0, ",
                 particles, "), got ", index[i]);
  }
}

Tensor trace_ancestors(const Tensor& ancestors, const Tensor& indices) {
  const TraceArguments call = check_trace(ancestors, indices, check_cpu);
  const int64_t steps = call.steps;
  const int64_t rows = call.rows;
  const int64_t particles = call.particles;
  const int64_t paths = call.paths;
  const Tensor from = dense(ancestors);
  const Tensor last = dense(indices);
  check_indices("ancestors", from, particles);
  check_indices("indices", last, particles);
  const Tensor result = empty(call.result, ScalarType::Long, ancestors);
  const auto* parent = static_cast<const int64_t*>(from.data_ptr());
  const auto* end = static_cast<const int64_t*>(last.data_ptr());
  auto* path = static_cast<int64_t*>(result.data_ptr());
  const int64_t grain = 1 + 16384 / ((steps + 1) * (paths + 1));
  parallel_for(0, rows, grain, [&](int64_t first, int64_t stop) {
    for (int64_t r = first; r < stop; ++r) {
      for (int64_t j = 0; j < paths; ++j) path[(steps * rows + r) * paths + j] = end[r * paths + j];
      for (int64_t t = steps; t-- > 0;) {
        const int64_t* later = path + ((t + 1) * rows + r) * paths;
        const int64_t* row = parent + (t * rows + r) * particles;
        int64_t* now = path + (t * rows + r) * paths;
        for (int64_t j = 0; j < paths; ++j) now[j] = row[later[j]];
      }
    }
  });
  return result;
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("trace_ancestors", TORCH_BOX(&winnow::trace_ancestors));
}
