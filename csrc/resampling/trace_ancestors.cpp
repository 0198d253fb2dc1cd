// winnow::trace_ancestors on the CPU: from the last generation back to the first, population by
// population.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/checks.h"
#include "common/tensors.h"

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
  check_cpu("ancestors", ancestors);
  check_dtype("ancestors", ancestors, ScalarType::Long);
  WINNOW_CHECK(ancestors.dim() >= 2, "ancestors: expected (T, ..., K), got shape ",
               shape_of(ancestors));
  check_cpu("indices", indices);
  check_dtype("indices", indices, ScalarType::Long);
  Shape population = shape(ancestors);
  population.erase(population.begin());
  const int64_t particles = population.back();
  population.pop_back();
  WINNOW_CHECK(indices.dim() >= 1 && leading_shape(indices) == population,
               "indices: expected (..., M) for ancestors of shape ", shape_of(ancestors),
               ", got shape ", shape_of(indices));
  const Tensor from = torch::stable::contiguous(ancestors);
  const Tensor last = torch::stable::contiguous(indices);
  check_indices("ancestors", from, particles);
  check_indices("indices", last, particles);

  const int64_t steps = ancestors.size(0);
  const int64_t paths = indices.size(indices.dim() - 1);
  const int64_t rows = product(population);
  Shape sizes = shape(indices);
  sizes.insert(sizes.begin(), steps + 1);
  const Tensor result = empty(sizes, ScalarType::Long, ancestors);
  const auto* parent = static_cast<const int64_t*>(from.data_ptr());
  const auto* end = static_cast<const int64_t*>(last.data_ptr());
  auto* path = static_cast<int64_t*>(result.data_ptr());
  const int64_t grain = 1 + 16384 / ((steps + 1) * (paths + 1));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t first, int64_t stop) {
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
