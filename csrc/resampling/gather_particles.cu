// winnow::gather_particles and its in-place form on the GPU. Rows move in units of up to 16 bytes.
// Into new memory, a warp copies a chunk of one row. In place, a block holds some columns of all
// rows of a population in shared memory between reading and writing, so any ancestors are right,
// cycles included, and rows that stay are neither read nor written. Populations too large for that
// go through a copy. What the ancestors hold is not checked on the GPU: a slot whose ancestor is
// outside of the population keeps its row in place, and is left undefined in new memory.
#include <algorithm>
#include <array>

#include "common/device.h"
#include "resampling/particle_layout.h"

namespace winnow {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kMostDimensions = 8;
constexpr int64_t kChunkUnits = 8 * kWarp;  // of a row, for one warp
constexpr int64_t kTileBytes = 48 * 1024;   // shared memory that needs no opting in

// Strides in units.
struct Dimensions {
  int count;
  std::array<Dimension, kMostDimensions> dimension;
};

struct Offset {
  int64_t from;
  int64_t to;
};

WINNOW_DEVICE Offset offset_of(const Dimensions& dimensions, int64_t index) {
  Offset offset = {0, 0};
  for (int d = dimensions.count - 1; d >= 0; --d) {
    const Dimension& dimension = dimensions.dimension[d];
    const int64_t at = index % dimension.size;
    index /= dimension.size;
    offset.from += at * dimension.from;
    offset.to += at * dimension.to;
  }
  return offset;
}

template <typename Unit>
struct Rows2d {
  Global<const Unit> from;
  Global<Unit> to;
  Global<const int64_t> ancestors;  // (populations, samples)
  Dimensions populations;
  Dimensions pieces;
  int64_t piece_count;
  Dimension particle;
  int64_t samples;
  int64_t units;  // of a row's piece
  int64_t chunks;
  int64_t items;
  bool only_moved;  // leave rows that are their own ancestor alone
  bool same_slot;   // copy from the slot itself: back from where the ancestors' rows were gathered
};

template <typename Unit>
WINNOW_KERNEL(kThreads)
copy_rows(Rows2d<Unit> rows) {
  const int64_t item = block_index() * kWarps + warp_index();
  if (item >= rows.items) return;
  const int64_t chunk = item % rows.chunks;
  const int64_t slot = item / rows.chunks % rows.samples;
  const int64_t piece = item / rows.chunks / rows.samples % rows.piece_count;
  const int64_t population = item / rows.chunks / rows.samples / rows.piece_count;
  const int64_t ancestor = rows.ancestors[population * rows.samples + slot];
  if (ancestor < 0 || ancestor >= rows.particle.size) return;
  if (rows.only_moved && ancestor == slot) return;
  const Offset start = offset_of(rows.populations, population);
  const Offset inner = offset_of(rows.pieces, piece);
  const auto from =
      rows.from + start.from + inner.from + (rows.same_slot ? slot : ancestor) * rows.particle.from;
  const auto to = rows.to + start.to + inner.to + slot * rows.particle.to;
  const int64_t end =
      (chunk + 1) * kChunkUnits < rows.units ? (chunk + 1) * kChunkUnits : rows.units;
  for (int64_t u = chunk * kChunkUnits + lane_index(); u < end; u += kWarp) {
    const Unit unit = from[u];
    to[u] = unit;
  }
}

// Shared memory is handed out in units of two bytes.
template <typename Unit>
using Cell = std::conditional_t<sizeof(Unit) == 1, uint16_t, Unit>;

template <typename Unit>
constexpr int64_t kTileCells = kTileBytes / static_cast<int64_t>(sizeof(Cell<Unit>));

template <typename Unit>
WINNOW_KERNEL(kThreads)
move_rows(Rows2d<Unit> rows, int64_t columns) {
  WINNOW_SHARED(Cell<Unit>, tile, kTileCells<Unit>);
  const int64_t piece = block_index() / rows.chunks % rows.piece_count;
  const int64_t population = block_index() / rows.chunks / rows.piece_count;
  const int64_t first = block_index() % rows.chunks * columns;
  const int64_t width = first + columns < rows.units ? columns : rows.units - first;
  const Offset start = offset_of(rows.populations, population);
  const Offset inner = offset_of(rows.pieces, piece);
  const auto base = rows.to + start.to + inner.to + first;
  const auto ancestors = rows.ancestors + population * rows.samples;
  const auto each = [&](const auto& visit) {
    for (int64_t i = thread_index(); i < rows.samples * width; i += kThreads) {
      const int64_t slot = i / width;
      const int64_t ancestor = ancestors[slot];
      const bool moves = ancestor != slot && ancestor >= 0 && ancestor < rows.samples;
      if (moves) visit(i, slot, ancestor, i % width);
    }
  };
  each([&](int64_t i, int64_t, int64_t ancestor, int64_t column) {
    const Unit unit = base[ancestor * rows.particle.to + column];
    tile[i] = static_cast<Cell<Unit>>(unit);
  });
  block_sync();
  each([&](int64_t i, int64_t slot, int64_t, int64_t column) {
    const Cell<Unit> cell = tile[i];
    base[slot * rows.particle.to + column] = static_cast<Unit>(cell);
  });
}

// ---- launchers ----

// The largest of 16 bytes and the element's size that divides every address.
int64_t unit_bytes(const Layout& layout, const Tensor& from, const Tensor& to) {
  const auto address = reinterpret_cast<uintptr_t>(from.data_ptr()) |
                       reinterpret_cast<uintptr_t>(to.data_ptr()) |
                       static_cast<uintptr_t>(layout.bytes);
  auto all = static_cast<int64_t>(address);
  const auto add = [&](const Dimension& dimension) {
    if (dimension.size > 1) all |= dimension.from | dimension.to;
  };
  for (const Dimension& dimension : layout.populations) add(dimension);
  for (const Dimension& dimension : layout.pieces) add(dimension);
  add(layout.particle);
  all |= layout.particle.to;  // of new memory, which may hold more slots than there are particles
  return all % 16 == 0 ? 16 : std::min<int64_t>(8, static_cast<int64_t>(from.element_size()));
}

template <typename Fn>
void dispatch_unit(int64_t bytes, const Fn& fn) {
  switch (bytes) {
    case 16:
      return fn(Vector<uint32_t, 4>{});
    case 8:
      return fn(uint64_t{});
    case 4:
      return fn(uint32_t{});
    case 2:
      return fn(uint16_t{});
    default:
      return fn(uint8_t{});
  }
}

Dimensions in_units(const std::vector<Dimension>& dimensions, int64_t bytes) {
  WINNOW_CHECK(dimensions.size() <= kMostDimensions, "state: expected at most ", kMostDimensions,
               " dimensions on either side of the particles on the GPU, got ", dimensions.size());
  Dimensions result = {};
  for (const Dimension& d : dimensions) {
    result.dimension[static_cast<size_t>(result.count++)] = {d.size, d.from / bytes, d.to / bytes};
  }
  return result;
}

template <typename Unit>
Rows2d<Unit> rows_of(const Layout& layout, const Tensor& from, const Tensor& to,
                     const Tensor& ancestors) {
  const auto bytes = static_cast<int64_t>(sizeof(Unit));
  Rows2d<Unit> rows = {};
  rows.from = global<const Unit>(from);
  rows.to = global<Unit>(to);
  rows.ancestors = global<const int64_t>(ancestors);
  rows.populations = in_units(layout.populations, bytes);
  rows.pieces = in_units(layout.pieces, bytes);
  rows.piece_count = layout.piece_count;
  rows.particle = {layout.particle.size, layout.particle.from / bytes, layout.particle.to / bytes};
  rows.samples = ancestors.size(ancestors.dim() - 1);
  rows.units = layout.bytes / bytes;
  rows.chunks = ceil_div<int64_t>(rows.units, kChunkUnits);
  rows.items = layout.population_count * layout.piece_count * rows.samples * rows.chunks;
  return rows;
}

void copy(const Tensor& from, const Tensor& to, const Tensor& ancestors, int64_t dim,
          bool only_moved, bool same_slot, const Stream& stream) {
  const Layout layout = layout_of(from, dim, ancestors.dim() - 1, to);
  dispatch_unit(unit_bytes(layout, from, to), [&](auto zero) {
    using Unit = decltype(zero);
    Rows2d<Unit> rows = rows_of<Unit>(layout, from, to, ancestors);
    rows.only_moved = only_moved;
    rows.same_slot = same_slot;
    launch("gather_particles", copy_rows<Unit>, {ceil_div<int64_t>(rows.items, kWarps)}, kThreads,
           stream, rows);
  });
}

Tensor gather_particles_cuda(const Tensor& state, const Tensor& ancestors, int64_t dim) {
  const int64_t at = check_gather(state, ancestors, dim, check_device);
  Shape sizes = shape(state);
  sizes[static_cast<size_t>(at)] = ancestors.size(ancestors.dim() - 1);
  const Stream stream(state);
  Tensor result = empty(sizes, state.scalar_type(), state);
  if (result.numel() == 0) return result;
  copy(state, result, dense(ancestors), at, false, false, stream);
  return result;
}

void gather_particles_in_place_cuda(Tensor state, const Tensor& ancestors, int64_t dim) {
  const int64_t at = check_gather(state, ancestors, dim, check_device);
  const int64_t particles = state.size(at);
  check_in_place(state, ancestors, particles);
  if (state.numel() == 0) return;
  const Stream stream(state);
  // A leaf of the state may be the ancestors themselves.
  const Tensor index = state.data_ptr() == ancestors.data_ptr()
                           ? dense(torch::stable::clone(ancestors))
                           : dense(ancestors);
  const Layout layout = layout_of(state, at, ancestors.dim() - 1, state);
  const int64_t bytes = unit_bytes(layout, state, state);
  if (particles > kTileBytes / std::max<int64_t>(bytes, 2)) {
    const Tensor moved = empty(shape(state), state.scalar_type(), state);
    copy(state, moved, index, at, true, false, stream);
    copy(moved, state, index, at, true, true, stream);
    return;
  }
  dispatch_unit(bytes, [&](auto zero) {
    using Unit = decltype(zero);
    Rows2d<Unit> rows = rows_of<Unit>(layout, state, state, index);
    const int64_t columns = std::min(rows.units, kTileCells<Unit> / particles);
    rows.chunks = ceil_div(rows.units, columns);
    launch("gather_particles_", move_rows<Unit>,
           {layout.population_count * layout.piece_count * rows.chunks}, kThreads, stream, rows,
           columns);
  });
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("gather_particles", TORCH_BOX(&winnow::gather_particles_cuda));
  m.impl("gather_particles_", TORCH_BOX(&winnow::gather_particles_in_place_cuda));
}
