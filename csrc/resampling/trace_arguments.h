// What trace_ancestors and uniforms accept, on the CPU and on the GPU.
#pragma once

#include "common/checks.h"
#include "common/tensors.h"

namespace winnow {

// The sizes of a walk through (T, ..., K) ancestors from (..., M) indices.
struct TraceArguments {
  int64_t steps;
  int64_t rows;
  int64_t particles;
  int64_t paths;
  Shape result;
};

template <typename OnDevice>
TraceArguments check_trace(const Tensor& ancestors, const Tensor& indices,
                           const OnDevice& check_device) {
  check_device("ancestors", ancestors);
  check_dtype("ancestors", ancestors, ScalarType::Long);
  WINNOW_CHECK(ancestors.dim() >= 2, "ancestors: expected (T, ..., K), got shape ",
               shape_of(ancestors));
  check_device("indices", indices);
  check_dtype("indices", indices, ScalarType::Long);
  Shape population = shape(ancestors);
  population.erase(population.begin());
  const int64_t particles = population.back();
  population.pop_back();
  WINNOW_CHECK(indices.dim() >= 1 && leading_shape(indices) == population,
               "indices: expected (..., M) for ancestors of shape ", shape_of(ancestors),
               ", got shape ", shape_of(indices));
  Shape result = shape(indices);
  result.insert(result.begin(), ancestors.size(0) + 1);
  return {ancestors.size(0), product(population), particles, indices.size(indices.dim() - 1),
          result};
}

inline void check_uniforms(int64_t rows, int64_t count) {
  WINNOW_CHECK(rows >= 0 && count >= 0, "rows, count: expected no negative numbers, got ", rows,
               " and ", count);
  constexpr int64_t kMost = int64_t{1} << 40;
  WINNOW_CHECK(rows <= kMost && count <= kMost && rows <= kMost / (count + 1),
               "rows, count: expected at most 2^40 numbers, got ", rows, " times ", count);
}

}  // namespace winnow
