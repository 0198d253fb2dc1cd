// What gather_particles accepts and how it sees a state tensor, on the CPU and on the GPU:
// populations, particles, and pieces of contiguous bytes.
#pragma once

#include <vector>

#include "common/checks.h"

namespace winnow {

struct Dimension {
  int64_t size;
  int64_t from;  // strides in bytes
  int64_t to;
};

// A state tensor as populations x particles x pieces of contiguous bytes.
struct Layout {
  std::vector<Dimension> populations;
  std::vector<Dimension> pieces;
  Dimension particle;
  int64_t population_count = 1;
  int64_t piece_count = 1;
  int64_t bytes = 1;  // of a piece
};

// Returns the dimension of the particles.
template <typename OnDevice>
int64_t check_gather(const Tensor& state, const Tensor& ancestors, int64_t dim,
                     const OnDevice& check_device) {
  check_device("state", state);
  check_device("ancestors", ancestors);
  check_dtype("ancestors", ancestors, ScalarType::Long);
  WINNOW_CHECK(ancestors.dim() >= 1, "ancestors: expected (..., M), got a scalar");
  const int64_t leading = ancestors.dim() - 1;
  const int64_t at = dim < 0 ? dim + state.dim() : dim;
  WINNOW_CHECK(at >= leading && at < state.dim(), "dim: expected a dimension of state ",
               shape_of(state), " behind the ", leading,
               " population dimensions of ancestors, got ", dim);
  for (int64_t d = 0; d < leading; ++d) {
    WINNOW_CHECK(state.size(at - leading + d) == ancestors.size(d),
                 "state: expected the population dimensions of ancestors ", shape_of(ancestors),
                 " before the particle dimension ", at, ", got shape ", shape_of(state));
  }
  return at;
}

inline void check_in_place(const Tensor& state, const Tensor& ancestors, int64_t particles) {
  WINNOW_CHECK(ancestors.size(ancestors.dim() - 1) == particles,
               "ancestors: expected one per particle (", particles,
               ") to gather in place, got shape ", shape_of(ancestors));
  for (int64_t d = 0; d < state.dim(); ++d) {
    WINNOW_CHECK(state.size(d) <= 1 || state.stride(d) != 0,
                 "state: expected memory of its own to gather in place, got a tensor expanded in "
                 "dimension ",
                 d);
  }
}

inline Layout layout_of(const Tensor& state, int64_t dim, int64_t leading, const Tensor& target) {
  const auto size = static_cast<int64_t>(state.element_size());
  const auto dimension = [&](int64_t d) {
    return Dimension{state.size(d), state.stride(d) * size, target.stride(d) * size};
  };
  Layout layout;
  layout.bytes = size;
  layout.particle = dimension(dim);
  int64_t inner = state.dim() - 1;
  for (; inner > dim; --inner) {
    const Dimension d = dimension(inner);
    if (d.size != 1 && (d.from != layout.bytes || d.to != layout.bytes)) break;
    layout.bytes *= d.size;
  }
  for (int64_t d = 0; d <= inner; ++d) {
    if (d == dim) continue;
    const bool population = d >= dim - leading && d < dim;
    (population ? layout.populations : layout.pieces).push_back(dimension(d));
    (population ? layout.population_count : layout.piece_count) *= state.size(d);
  }
  return layout;
}

}  // namespace winnow
