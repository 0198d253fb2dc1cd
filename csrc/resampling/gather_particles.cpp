// winnow::gather_particles and its in-place form on the CPU: slot j of a population takes the row
// of particle ancestors[j]. No arithmetic, hence any dtype, and no loop of its own per instruction
// set.
//
// In place, a row may be overwritten once nobody waits for it any more; what is left then are
// cycles, which one row of spare memory opens. Rows that stay are not touched: after `keep_slots`
// that is a third to two thirds of them. The rows are cut in chunks, and every chunk makes all
// moves of its population in the same order, so chunks are independent and the spare memory is one
// chunk.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "resampling/particle_layout.h"

namespace winnow {
namespace {

constexpr int64_t kChunk = 65536;  // bytes; source, target and spare chunk fit a second-level cache

// The indices, checked and copied: a leaf of the state may be the ancestors themselves.
std::vector<int64_t> check_ancestors(const Tensor& ancestors, int64_t particles) {
  const Tensor ordered = dense(ancestors);
  const auto* first = static_cast<const int64_t*>(ordered.data_ptr());
  std::vector<int64_t> index(first, first + ordered.numel());
  bool valid = true;
  for (const int64_t a : index) valid &= a >= 0 && a < particles;
  if (!valid) {
    for (const int64_t a : index) {
      WINNOW_CHECK(a >= 0 && a < particles, "ancestors: expected indices in [0, ", particles,
                   "), got ", a);
    }
  }
  return index;
}

struct Offset {
  int64_t from = 0;
  int64_t to = 0;
};

Offset offset_of(const std::vector<Dimension>& dimensions, int64_t index) {
  Offset offset;
  for (size_t d = dimensions.size(); d-- > 0;) {
    const int64_t at = index % dimensions[d].size;
    index /= dimensions[d].size;
    offset.from += at * dimensions[d].from;
    offset.to += at * dimensions[d].to;
  }
  return offset;
}

// Calls work(population, offset, bytes) for every population and chunk, spread over threads; a
// thread visits the chunks of a population one after another.
template <typename Work>
void each_chunk(const Layout& layout, int64_t rows, const Work& make_work) {
  const int64_t chunks = (layout.bytes + kChunk - 1) / kChunk;
  const int64_t items = layout.population_count * layout.piece_count * chunks;
  if (layout.bytes == 0 || rows == 0) return;
  const int64_t item_bytes = rows * (layout.bytes < kChunk ? layout.bytes : kChunk);
  const int64_t grain = 1 + 131072 / (item_bytes + 64);
  parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    auto work = make_work();
    for (int64_t item = begin; item < end; ++item) {
      const int64_t chunk = item % chunks;
      const int64_t piece = item / chunks % layout.piece_count;
      const int64_t population = item / chunks / layout.piece_count;
      const Offset start = offset_of(layout.populations, population);
      const Offset inner = offset_of(layout.pieces, piece);
      const int64_t first = chunk * kChunk;
      const int64_t rest = layout.bytes - first;
      work(population, Offset{start.from + inner.from + first, start.to + inner.to + first},
           rest < kChunk ? rest : kChunk);
    }
  });
}

void copy_bytes(char* to, const char* from, int64_t bytes) {
  switch (bytes) {  // one element: a call of memcpy would cost more than the copy
    case 2:
      std::memcpy(to, from, 2);
      break;
    case 4:
      std::memcpy(to, from, 4);
      break;
    case 8:
      std::memcpy(to, from, 8);
      break;
    default:
      std::memcpy(to, from, static_cast<size_t>(bytes));
  }
}

// The order in which the rows of one population can move without a copy of the whole.
class MovePlan {
 public:
  struct Move {
    int64_t to;  // kSpare: the spare row
    int64_t from;
  };
  static constexpr int64_t kSpare = -1;

  const std::vector<Move>& plan(const int64_t* ancestors, int64_t particles) {
    moves_.clear();
    waiting_.assign(static_cast<size_t>(particles), 0);
    for (int64_t j = 0; j < particles; ++j) {
      if (ancestors[j] != j) ++waiting_[static_cast<size_t>(ancestors[j])];
    }
    for (int64_t j = 0; j < particles; ++j) {
      // A row that nobody waits for takes its ancestor's, which may free the ancestor's slot.
      int64_t to = j;
      while (ancestors[to] != to && waiting_[static_cast<size_t>(to)] == 0) {
        const int64_t from = ancestors[to];
        moves_.push_back({to, from});
        waiting_[static_cast<size_t>(to)] = kMoved;
        --waiting_[static_cast<size_t>(from)];
        to = from;
      }
    }
    for (int64_t j = 0; j < particles; ++j) {
      if (ancestors[j] == j || waiting_[static_cast<size_t>(j)] == kMoved) continue;
      moves_.push_back({kSpare, j});
      int64_t to = j;
      for (; ancestors[to] != j; to = ancestors[to]) {
        moves_.push_back({to, ancestors[to]});
        waiting_[static_cast<size_t>(to)] = kMoved;
      }
      moves_.push_back({to, kSpare});
      waiting_[static_cast<size_t>(to)] = kMoved;
    }
    return moves_;
  }

 private:
  static constexpr int64_t kMoved = -1;
  std::vector<Move> moves_;
  std::vector<int64_t> waiting_;  // slots that still have to read this row
};

Tensor gather_particles(const Tensor& state, const Tensor& ancestors, int64_t dim) {
  const int64_t at = check_gather(state, ancestors, dim, check_cpu);
  const int64_t leading = ancestors.dim() - 1;
  const std::vector<int64_t> index = check_ancestors(ancestors, state.size(at));
  Shape sizes = shape(state);
  const int64_t samples = sizes[static_cast<size_t>(at)] = ancestors.size(leading);
  Tensor result = empty(sizes, state.scalar_type(), state);
  if (result.numel() == 0) return result;
  const Layout layout = layout_of(state, at, leading, result);
  const auto* from = static_cast<const char*>(state.data_ptr());
  auto* to = static_cast<char*>(result.data_ptr());
  each_chunk(layout, samples, [&] {
    return [&](int64_t population, Offset offset, int64_t bytes) {
      const int64_t* ancestor = index.data() + population * samples;
      for (int64_t j = 0; j < samples; ++j) {
        copy_bytes(to + offset.to + j * layout.particle.to,
                   from + offset.from + ancestor[j] * layout.particle.from, bytes);
      }
    };
  });
  return result;
}

void gather_particles_(Tensor state, const Tensor& ancestors, int64_t dim) {
  const int64_t at = check_gather(state, ancestors, dim, check_cpu);
  const int64_t leading = ancestors.dim() - 1;
  const int64_t particles = state.size(at);
  check_in_place(state, ancestors, particles);
  const std::vector<int64_t> index = check_ancestors(ancestors, particles);
  if (state.numel() == 0) return;
  const Layout layout = layout_of(state, at, leading, state);
  auto* rows = static_cast<char*>(state.data_ptr());
  each_chunk(layout, particles, [&] {
    return [&, plan = MovePlan(), moves = static_cast<const std::vector<MovePlan::Move>*>(nullptr),
            planned = int64_t{-1},
            spare = std::vector<char>()](int64_t population, Offset offset, int64_t bytes) mutable {
      if (planned != population) {
        moves = &plan.plan(index.data() + population * particles, particles);
        planned = population;
      }
      spare.resize(static_cast<size_t>(bytes));
      const auto row = [&](int64_t k) {
        return k == MovePlan::kSpare ? spare.data() : rows + offset.from + k * layout.particle.from;
      };
      for (const MovePlan::Move& move : *moves) copy_bytes(row(move.to), row(move.from), bytes);
    };
  });
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("gather_particles", TORCH_BOX(&winnow::gather_particles));
  m.impl("gather_particles_", TORCH_BOX(&winnow::gather_particles_));
}
