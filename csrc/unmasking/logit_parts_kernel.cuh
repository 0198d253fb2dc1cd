// Parts of a vocabulary on the GPU, in the words of logit_part.h: written from the sums of a part's
// blocks, and put together again, a thread block per row. What a part sends of the blocks that it
// shares with its neighbours, its edges, is assembled in slots of kLogitBlock logits and scanned
// like any other row.
#pragma once

#include "unmasking/logit_part.h"
#include "unmasking/logit_rows_kernel.cuh"

namespace winnow {
namespace {

// Everything is null where there are no previous logits.
struct PreviousSums {
  Global<const SliceSums> blocks;
  Global<const double> cross;
};

template <typename Real>
WINNOW_KERNEL(kThreads)
write_parts(LogitView<Real> view, LogitView<Real> previous, RowOptions options, PartLayout layout,
            Global<const SliceSums> blocks, PreviousSums before, Global<Real> parts) {
  WINNOW_SHARED(uint32_t, bits, kThreads);
  WINNOW_SHARED(Clock, clock_scratch, kThreads / kWarp);
  WINNOW_SHARED(double, scan_scratch, kThreads / kWarp);
  WINNOW_SHARED(int64_t, index_scratch, kThreads / kWarp);
  const int64_t row = block_index();
  const auto part = parts + row * layout.words();
  if (skips(view, row)) {
    for (int64_t w = thread_index(); w < layout.words(); w += kThreads) part[w] = Real(0);
    return;
  }
  const auto copy_edges = [&](const LogitView<Real>& from, int64_t head_at, int64_t tail_at) {
    for (int64_t i = thread_index(); i < layout.head; i += kThreads) {
      part[head_at + i] = logit_at(from, row, i);
    }
    for (int64_t i = thread_index(); i < layout.tail; i += kThreads) {
      part[tail_at + i] = logit_at(from, row, view.vocab - layout.tail + i);
    }
  };
  copy_edges(view, kPartHeader, layout.tail_at());
  if (layout.previous) copy_edges(previous, layout.previous_at(), layout.previous_tail_at());

  const Real none = -std::numeric_limits<Real>::infinity();
  const Real nan = std::numeric_limits<Real>::quiet_NaN();
  const int64_t first = layout.head > 0 ? 1 : 0;
  const auto mine = blocks + row * view.blocks();
  for (int64_t i = thread_index(); i < layout.whole; i += kThreads) {
    const SliceSums block = mine[first + i];
    const int64_t begin = view.start + layout.head + i * kLogitBlock;
    const auto words = part + layout.sums_at() + i * kSumsWords;
    words[0] = static_cast<Real>(block.top.first);
    words[1] = static_cast<Real>(block.top.second);
    words[2] = block.top.argmax < 0 ? Real(-1) : static_cast<Real>(block.top.argmax - begin);
    words[3] = static_cast<Real>(block.sums.mass);
    words[4] = block.top.nan != 0 ? nan : static_cast<Real>(block.sums.moment / kMomentUnit);
    words[5] = static_cast<Real>(block.sums.drawn);
    if (!layout.previous) continue;
    const SliceSums other = before.blocks[row * view.blocks() + first + i];
    const double cross = before.cross[row * view.blocks() + first + i];
    const auto more = part + layout.previous_sums_at() + i * kPreviousWords;
    more[0] = static_cast<Real>(other.top.first);
    more[1] = other.top.nan != 0 ? nan : static_cast<Real>(other.sums.mass);
    more[2] = static_cast<Real>(cross);
  }

  Clock clock = {0.0, -1, 0.0};
  double reference = 0.0;
  if (options.draws) {
    // Relative to no common logit: clocks are in logarithms.
    const auto log_mass = [&](int64_t b) {
      const SliceSums block = mine[b];
      return log_drawn(block, 0.0, options.draw_temperature);
    };
    clock = race_blocks(options.seed, view.key(row), view.start / kLogitBlock, first,
                        first + layout.whole, log_mass, Shared<Clock>(clock_scratch));
  }
  int64_t token = -1;
  if (clock.block >= 0) {
    const SliceSums block = mine[clock.block];
    reference = block.top.first;
    token = draw_in_block(view, row, clock.block, reference, options.draw_temperature,
                          clock.uniform, keep_all(), Shared<uint32_t>(bits),
                          Shared<double>(scan_scratch), Shared<int64_t>(index_scratch));
  }
  if (thread_index() != 0) return;
  part[kMeasured] = Real(1);
  part[kDrawnIndex] = static_cast<Real>(token);
  part[kDrawnLogit] = token < 0 ? none : logit_at(view, row, token);
  part[kTargetLogit] = none;
  if (options.target) {
    const int64_t id = options.target[row];
    const int64_t at = id - view.start;
    if (at >= 0 && at < view.vocab) part[kTargetLogit] = logit_at(view, row, at);
  }
}

// One of the parts, and where it belongs. Blocks count from the first one of the whole.
template <typename Real>
struct PartSource {
  Global<const Real> words;
  PartLayout layout;
  int64_t index;
  int64_t start;  // id of its first token
  int64_t count;
  int64_t head_slot;  // of its first edge; the next blocks have the next slots
  int64_t tail_slot;
  int64_t pad_before;  // places of its first slot before the vocabulary, for the first part
  int64_t pad_after;   // places of its last slot behind it, for the last
};

// Where the token of a block comes from: its edge, or the part that holds it whole.
struct BlockOrigin {
  int64_t slot;   // -1: none
  int64_t token;  // that the part drew, -1 where it drew in another block
  double logit;
};

// A row's answers in one part.
struct PartAnswer {
  double measured;
  double target;
};

template <typename Real>
struct WholeRows {
  int64_t start;
  int64_t vocab;
  int64_t blocks;
  int64_t slots;
  int64_t parts;
  bool has_previous;
  Global<PartAnswer> answers;  // (rows, parts)
  Global<SliceSums> sums;      // (rows, blocks), as the next three
  Global<SliceSums> previous;
  Global<double> cross;
  Global<BlockOrigin> origins;
  Global<Real> edges;  // (rows, slots, kLogitBlock), as the next
  Global<Real> previous_edges;
  Global<const int64_t> keys;  // or null

  WINNOW_DEVICE int64_t first_place() const { return start / kLogitBlock; }
};

template <typename Real>
WINNOW_KERNEL(kThreads)
collect_part(PartSource<Real> part, WholeRows<Real> whole) {
  const int64_t row = block_index();
  const PartLayout& layout = part.layout;
  const auto words = part.words + row * layout.words();
  const auto word = [&](int64_t at) {
    const Real value = words[at];
    return value;
  };
  const double infinity = std::numeric_limits<double>::infinity();
  if (thread_index() == 0) {
    whole.answers[row * whole.parts + part.index] =
        PartAnswer{static_cast<double>(word(kMeasured)), static_cast<double>(word(kTargetLogit))};
  }
  const auto copy_edge = [&](int64_t slot, int64_t begin, int64_t count, int64_t at,
                             Global<Real> edges) {
    const auto to = edges + (row * whole.slots + slot) * kLogitBlock + begin % kLogitBlock;
    for (int64_t i = thread_index(); i < count; i += kThreads) to[i] = word(at + i);
  };
  const int64_t tail_begin = part.start + part.count - layout.tail;
  const auto copy_edges = [&](int64_t head_at, int64_t tail_at, Global<Real> edges) {
    const Real none = -std::numeric_limits<Real>::infinity();
    copy_edge(part.head_slot, part.start, layout.head, head_at, edges);
    copy_edge(part.tail_slot, tail_begin, layout.tail, tail_at, edges);
    const auto first = edges + (row * whole.slots + part.head_slot) * kLogitBlock;
    for (int64_t i = thread_index(); i < part.pad_before; i += kThreads) first[i] = none;
    const auto end = edges + (row * whole.slots + whole.slots) * kLogitBlock;
    for (int64_t i = thread_index(); i < part.pad_after; i += kThreads) {
      end[i - part.pad_after] = none;
    }
  };
  copy_edges(kPartHeader, layout.tail_at(), whole.edges);
  if (whole.has_previous) {
    copy_edges(layout.previous_at(), layout.previous_tail_at(), whole.previous_edges);
  }
  const auto mark_edges = [&](int64_t slot, int64_t begin, int64_t count) {
    if (count == 0) return;
    const int64_t first = begin / kLogitBlock;
    const int64_t last = (begin + count - 1) / kLogitBlock;
    for (int64_t b = first + thread_index(); b <= last; b += kThreads) {
      whole.origins[row * whole.blocks + b - whole.first_place()] =
          BlockOrigin{slot + b - first, -1, -infinity};
    }
  };
  mark_edges(part.head_slot, part.start, layout.head);
  mark_edges(part.tail_slot, tail_begin, layout.tail);

  const int64_t drawn = static_cast<int64_t>(word(kDrawnIndex));
  for (int64_t i = thread_index(); i < layout.whole; i += kThreads) {
    const int64_t begin = part.start + layout.head + i * kLogitBlock;
    const int64_t to = row * whole.blocks + begin / kLogitBlock - whole.first_place();
    const int64_t at = layout.sums_at() + i * kSumsWords;
    const int64_t offset = static_cast<int64_t>(word(at + 2));
    const double moment = word(at + 4);
    const int64_t nan = moment != moment;
    whole.sums[to] = SliceSums{{word(at), word(at + 1), offset < 0 ? -1 : begin + offset, nan},
                               {word(at + 3), moment * kMomentUnit, word(at + 5)}};
    const int64_t own = drawn - (begin - part.start);
    const bool here = drawn >= 0 && own >= 0 && own < kLogitBlock;
    whole.origins[to] = BlockOrigin{-1, here ? part.start + drawn : -1, word(kDrawnLogit)};
    if (!whole.has_previous) continue;
    const int64_t more = layout.previous_sums_at() + i * kPreviousWords;
    const double mass = word(more + 1);
    const int64_t lost = mass != mass;
    whole.previous[to] = SliceSums{{word(more), -infinity, -1, lost}, {mass, 0.0, mass}};
    whole.cross[to] = word(more + 2);
  }
}

// As finish_rows, where the logits of the drawn and the target token came with the parts.
template <typename Real>
WINNOW_KERNEL(kThreads)
finish_merged(WholeRows<Real> whole, RowOptions options, RowOutputs<Real> out) {
  WINNOW_SHARED(uint32_t, bits, kThreads);
  WINNOW_SHARED(TopTwo, top_scratch, kThreads / kWarp);
  WINNOW_SHARED(Sums, sum_scratch, kThreads / kWarp);
  WINNOW_SHARED(Clock, clock_scratch, kThreads / kWarp);
  WINNOW_SHARED(double, scan_scratch, kThreads / kWarp);
  WINNOW_SHARED(int64_t, index_scratch, kThreads / kWarp);
  const int64_t row = block_index();
  const bool writes = thread_index() == 0;
  const double infinity = std::numeric_limits<double>::infinity();
  bool measured_by_all = true;
  double target = -infinity;
  for (int64_t p = 0; p < whole.parts; ++p) {
    const PartAnswer answer = whole.answers[row * whole.parts + p];
    measured_by_all = measured_by_all && answer.measured != 0.0;
    if (answer.target > target) target = answer.target;
  }
  if (!measured_by_all) {
    if (writes) out.fill(row, -1, 0, Real(0));
    return;
  }
  const auto mine = whole.sums + row * whole.blocks;
  const auto origins = whole.origins + row * whole.blocks;
  const Distribution measured = merge_row(mine, whole.blocks, options.temperature,
                                          Shared<TopTwo>(top_scratch), Shared<Sums>(sum_scratch));
  if (!is_described(measured.top, out, row)) return;
  const double top = measured.top.first;
  int64_t token = measured.top.argmax;
  double logit = top;
  if (options.draws) {
    const auto log_mass = [&](int64_t b) {
      const BlockOrigin origin = origins[b];
      if (origin.token < 0 && origin.slot < 0) return -infinity;
      const SliceSums block = mine[b];
      return log_drawn(block, top, options.draw_temperature);
    };
    int64_t key = row;
    if (whole.keys) key = whole.keys[row];
    const Clock clock = race_blocks(options.seed, key, whole.first_place(), 0, whole.blocks,
                                    log_mass, Shared<Clock>(clock_scratch));
    if (clock.block < 0) {  // the parts drew nothing
      if (writes) out.fill(row, -1, 0, Real(0));
      return;
    }
    const BlockOrigin origin = origins[clock.block];
    token = origin.token;
    logit = origin.logit;
    if (origin.slot >= 0) {
      const SliceSums block = mine[clock.block];
      LogitView<Real> edge = {};
      edge.logits = {whole.edges + (row * whole.slots + origin.slot) * kLogitBlock};
      edge.vocab = kLogitBlock;
      const int64_t at = draw_in_block(
          edge, 0, 0, block.top.first, options.draw_temperature, clock.uniform, keep_all(),
          Shared<uint32_t>(bits), Shared<double>(scan_scratch), Shared<int64_t>(index_scratch));
      token = (whole.first_place() + clock.block) * kLogitBlock + at;
      const Real drawn = edge.logits[at];
      logit = drawn;
    }
  }
  if (!writes) return;
  const auto log_prob = [&](double x) {
    return static_cast<Real>((x - top) / options.temperature - log(measured.mass));
  };
  describe(measured, measured.top.second, options.temperature, out, row);
  out.token[row] = token;
  out.log_prob[row] = log_prob(logit);
  if (out.target_log_prob) out.target_log_prob[row] = log_prob(target);
}

}  // namespace
}  // namespace winnow
