// winnow::merge_logit_stats on the GPU: a launch for each part, which puts its sums and its edges
// in their places, one for each run of edges (three with previous logits), one for the divergence,
// and one that finishes the rows.
#include <optional>
#include <tuple>
#include <vector>

#include "unmasking/logit_arguments.h"
#include "unmasking/logit_outputs.cuh"
#include "unmasking/logit_parts_kernel.cuh"

namespace winnow {
namespace {

// Neighbouring blocks that parts sent as logits.
struct EdgeRun {
  int64_t slot;
  int64_t block;
  int64_t count;
};

// Where the edges go: as few slots as there are such blocks, in order.
class Edges {
 public:
  // Slot of the first of the blocks that ids `begin` to begin + count - 1 lie in.
  int64_t add(int64_t begin, int64_t count) {
    if (count == 0) return 0;
    const int64_t first = begin / kLogitBlock;
    const int64_t last = (begin + count - 1) / kLogitBlock;
    const int64_t slot = slots_ - (slots_ > 0 && first == last_ ? 1 : 0);
    for (int64_t b = first; b <= last; ++b) {
      if (slots_ > 0 && b == last_) continue;
      if (runs_.empty() || b != last_ + 1) runs_.push_back({slots_, b, 0});
      ++runs_.back().count;
      ++slots_;
      last_ = b;
    }
    return slot;
  }
  int64_t slots() const { return slots_; }
  const std::vector<EdgeRun>& runs() const { return runs_; }

 private:
  int64_t slots_ = 0;
  int64_t last_ = -1;
  std::vector<EdgeRun> runs_;
};

template <typename Real>
void merge_rows(const std::vector<Tensor>& parts, const std::vector<int64_t>& starts,
                const std::vector<int64_t>& counts, bool has_previous,
                const std::optional<Tensor>& keys, const RowOptions& options,
                const RowOutputs<Real>& out, const Stream& stream) {
  const Tensor& like = parts.front();
  const int64_t rows = product(leading_shape(like));
  std::vector<PartSource<Real>> sources;
  Edges edges;
  for (size_t p = 0; p < parts.size(); ++p) {
    PartSource<Real> source = {};
    source.words = global<const Real>(parts[p]);
    source.layout = part_layout(starts[p], counts[p], has_previous, std::is_same_v<Real, double>);
    source.index = static_cast<int64_t>(p);
    source.start = starts[p];
    source.count = counts[p];
    source.head_slot = edges.add(starts[p], source.layout.head);
    source.tail_slot = edges.add(starts[p] + counts[p] - source.layout.tail, source.layout.tail);
    sources.push_back(source);
  }
  WholeRows<Real> whole = {};
  whole.start = starts.front();
  whole.vocab = starts.back() + counts.back() - whole.start;
  whole.blocks = logit_blocks(whole.start, whole.vocab);
  whole.slots = edges.slots();
  whole.parts = static_cast<int64_t>(parts.size());
  whole.has_previous = has_previous;
  if (whole.slots > 0) {
    const int64_t before = whole.start % kLogitBlock;
    const int64_t end = whole.start + whole.vocab;
    // Parts without tokens have no edges.
    for (auto first = sources.begin(); first != sources.end(); ++first) {
      if (first->count == 0) continue;
      first->pad_before = before;
      break;
    }
    for (auto last = sources.rbegin(); last != sources.rend(); ++last) {
      if (last->count == 0) continue;
      last->pad_after = (kLogitBlock - end % kLogitBlock) % kLogitBlock;
      break;
    }
  }
  const auto workspace = [&](int64_t count, size_t bytes) {
    const auto words = static_cast<int64_t>(bytes / sizeof(double));
    return empty({rows * count, words}, ScalarType::Double, like);
  };
  const Tensor answers = workspace(whole.parts, sizeof(PartAnswer));
  const Tensor sums = workspace(whole.blocks, sizeof(SliceSums));
  const Tensor origins = workspace(whole.blocks, sizeof(BlockOrigin));
  const Tensor previous = workspace(has_previous ? whole.blocks : 0, sizeof(SliceSums));
  const Tensor cross = workspace(has_previous ? whole.blocks : 0, sizeof(double));
  const Shape edge_shape = {rows, whole.slots, kLogitBlock};
  const Tensor edge_logits = empty(edge_shape, like.scalar_type(), like);
  const Tensor previous_edges =
      empty(has_previous ? edge_shape : Shape{0}, like.scalar_type(), like);
  whole.answers = global<PartAnswer>(answers);
  whole.sums = global<SliceSums>(sums);
  whole.origins = global<BlockOrigin>(origins);
  whole.previous = global<SliceSums>(previous);
  whole.cross = global<double>(cross);
  whole.edges = global<Real>(edge_logits);
  whole.previous_edges = global<Real>(previous_edges);
  if (keys) whole.keys = global<const int64_t>(*keys);

  const Grid every_row = {rows};
  for (const PartSource<Real>& source : sources) {
    launch("merge_logit_stats", collect_part<Real>, every_row, kThreads, stream, source, whole);
  }
  for (const EdgeRun& run : edges.runs()) {
    const int64_t block = run.block - whole.start / kLogitBlock;
    const auto view_of_run = [&](Global<Real> logits) {
      LogitView<Real> view = {};
      view.logits = {logits + run.slot * kLogitBlock};
      view.stride = whole.slots * kLogitBlock;
      view.vectors = true;
      view.vocab = run.count * kLogitBlock;
      view.start = run.block * kLogitBlock;
      return view;
    };
    const Grid every_slice = {rows, ceil_div<int64_t>(run.count, kSliceBlocks)};
    const LogitView<Real> view = view_of_run(whole.edges);
    launch("merge_logit_stats", scan_blocks<Real>, every_slice, kThreads, stream, view,
           options.temperature, options.draw_temperature, whole.sums + block, whole.blocks);
    if (!has_previous) continue;
    const LogitView<Real> before = view_of_run(whole.previous_edges);
    launch("merge_logit_stats", scan_blocks<Real>, every_slice, kThreads, stream, before,
           options.temperature, options.temperature, whole.previous + block, whole.blocks);
    launch("merge_logit_stats", cross_blocks<Real>, every_slice, kThreads, stream, view, before,
           options.temperature, whole.sums + block, whole.previous + block,
           Global<Truncation>(nullptr), whole.cross + block, whole.blocks);
  }
  if (has_previous) {
    LogitView<Real> view = {};
    view.vocab = whole.vocab;
    view.start = whole.start;
    launch("merge_logit_stats", diverge_rows<Real>, every_row, kThreads, stream, view,
           options.temperature, whole.sums, whole.previous, Global<Sums>(nullptr), whole.cross,
           out.kl);
  }
  launch("merge_logit_stats", finish_merged<Real>, every_row, kThreads, stream, whole, options,
         out);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
merge_logit_stats_cuda(const std::vector<Tensor>& parts, const std::vector<int64_t>& starts,
                       const std::vector<int64_t>& counts, double temperature,
                       const std::optional<Tensor>& seed, bool raw, bool has_target,
                       bool has_previous, const std::optional<Tensor>& row_keys) {
  check_parts(parts, starts, counts, has_previous, check_device);
  const Tensor& like = parts.front();
  const auto keys = one_per_row("row_keys", row_keys, like, ScalarType::Long, check_device);
  const LogitOptions wanted = logit_options(temperature, seed.has_value(), raw);
  const Stream stream(like);
  RowOptions options = {};
  options.temperature = wanted.temperature;
  options.draw_temperature = wanted.draw_temperature;
  options.draws = wanted.draws;
  options.raw = wanted.raw;
  if (seed) options.seed = seed_of(*seed);
  std::vector<Tensor> dense_parts;
  dense_parts.reserve(parts.size());
  for (const Tensor& part : parts) dense_parts.push_back(dense(part));
  const LogitOutputs out(like, has_target, has_previous);
  dispatch_real(like, [&](auto zero) {
    using Real = decltype(zero);
    merge_rows<Real>(dense_parts, starts, counts, has_previous, keys, options, out.pointers<Real>(),
                     stream);
  });
  return out.tensors();
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("merge_logit_stats", TORCH_BOX(&winnow::merge_logit_stats_cuda));
}
