// winnow::score_blocks, select_blocks and score_select_blocks on the GPU: which blocks a step
// attends. A warp scores one block of one key head, lanes side by side along D; a thread block
// selects for one key head by ranks, without a sort. Selecting follows scoring in a launch of its
// own, because one key head's summaries would not fill a GPU.
#include <optional>

#include "kvcache/block_scores_arguments.h"
#include "kvcache/block_table.cuh"

namespace winnow {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

WINNOW_DEVICE int64_t blocks_in(Global<const int32_t> seq_lens, int64_t row, int64_t width,
                                const Competition& rule) {
  return ceil_div(length_of(seq_lens, row, width * rule.block_size), rule.block_size);
}

template <typename T, typename Real>
struct Scores {
  Global<const T> query;
  int64_t query_stride[3];  // batch, head, position
  Global<const Real> summaries;
  int64_t stride[3];      // batch, head, block; by place in the pages where there is a table
  int64_t bounds_stride;  // from the minimum to the maximum; 0 for means
  bool paged;
  Global<const int32_t> block_table;
  int64_t table_stride;
  int64_t num_blocks;
  int64_t group;
  int64_t queries;
  int64_t heads;
  int64_t blocks;
  int64_t dim;
  int64_t items;
  bool selects;  // only what competes is scored
  Global<const int32_t> seq_lens;
  Competition rule;
  Global<Real> result;
};

template <typename T, typename Real>
WINNOW_KERNEL(kThreads)
score(Scores<T, Real> call) {
  const int64_t item = block_index() * kWarps + warp_index();
  if (item >= call.items) return;
  const int64_t i = item % call.blocks;
  const int64_t head = item / call.blocks % call.heads;
  const int64_t row = item / call.blocks / call.heads;
  if (call.selects) {
    const int64_t held = blocks_in(call.seq_lens, row, call.blocks, call.rule);
    if (held <= call.rule.k || i < call.rule.sinks || i >= held - call.rule.recents) return;
  }
  int64_t block = i;
  if (call.paged) {
    block = static_cast<int32_t>(call.block_table[row * call.table_stride + i]);
    if (block < 0 || block >= call.num_blocks) {
      if (lane_index() == 0) call.result[item] = Real(0);
      return;
    }
  }
  const auto low =
      call.summaries + row * call.stride[0] + head * call.stride[1] + block * call.stride[2];
  Real best = -std::numeric_limits<Real>::infinity();
  for (int64_t n = 0; n < call.group * call.queries; ++n) {
    const auto query = call.query + row * call.query_stride[0] +
                       (head * call.group + n / call.queries) * call.query_stride[1] +
                       n % call.queries * call.query_stride[2];
    Real sum = Real(0);
    for (int64_t d = lane_index(); d < call.dim; d += kWarp) {
      const Real q = static_cast<Real>(static_cast<T>(query[d]));
      const Real a = q * static_cast<Real>(low[d]);
      const Real b =
          call.bounds_stride == 0 ? a : q * static_cast<Real>(low[call.bounds_stride + d]);
      sum += b > a || b != b ? b : a;
    }
    sum = warp_reduce(sum, [](Real a, Real b) { return a + b; });
    if (sum > best || sum != sum) best = sum;
  }
  if (lane_index() == 0) call.result[item] = best;
}

template <typename Real>
struct Selection {
  Global<const Real> scores;
  int64_t stride[2];  // batch, head
  Global<const int32_t> seq_lens;
  int64_t heads;
  int64_t width;
  Competition rule;
  Global<int32_t> result;
};

template <typename Real>
WINNOW_KERNEL(kThreads)
select(Selection<Real> call) {
  WINNOW_SHARED(Real, tile, kThreads);
  WINNOW_SHARED(int64_t, scratch, kWarps);
  const Competition rule = call.rule;
  const int64_t head = block_index() % call.heads;
  const int64_t row = block_index() / call.heads;
  const auto scores = call.scores + row * call.stride[0] + head * call.stride[1];
  const auto result = call.result + block_index() * rule.k;
  const int64_t blocks = blocks_in(call.seq_lens, row, call.width, rule);
  const int64_t end = blocks - rule.recents;  // of those that compete
  const int64_t wanted = rule.k - rule.sinks - rule.recents;
  const bool keeps_all = blocks <= rule.k;

  int64_t written = 0;
  for (int64_t first = 0; first < blocks; first += kThreads) {
    const int64_t i = first + thread_index();
    const bool competes = !keeps_all && i >= rule.sinks && i < end;
    const Real own = competes ? static_cast<Real>(scores[i]) : Real(0);
    int64_t better = 0;
    for (int64_t from = rule.sinks; !keeps_all && from < end; from += kThreads) {
      block_sync();
      const int64_t j = from + thread_index();
      tile[thread_index()] = j < end ? static_cast<Real>(scores[j]) : Real(0);
      block_sync();
      for (int n = 0; competes && n < kThreads && from + n < end; ++n) {
        const Real other = tile[n];
        const bool equal = other == own || (other != other && own != own);
        // A NaN comes last.
        if (equal ? from + n < i : other > own || (own != own && other == other)) ++better;
      }
    }
    const bool takes = i < blocks && (keeps_all || !competes || better < wanted);
    int64_t all = 0;
    const int64_t before =
        block_scan<kThreads>(static_cast<int64_t>(takes), Shared<int64_t>(scratch), &all);
    if (takes) result[written + before] = static_cast<int32_t>(i);
    written += all;
  }
  for (int64_t n = written + thread_index(); n < rule.k; n += kThreads) result[n] = -1;
}

// ---- launchers ----

template <typename T, typename Real>
Scores<T, Real> scores_of(const Tensor& query, const Tensor& summaries,
                          const std::optional<Tensor>& block_table) {
  const int64_t leading = block_table ? 2 : 3;
  Scores<T, Real> call = {};
  call.query = global<const T>(query);
  call.summaries = global<const Real>(summaries);
  for (int64_t d = 0; d < 3; ++d) call.query_stride[d] = query.stride(d);
  call.stride[0] = block_table ? 0 : summaries.stride(0);
  call.stride[1] = summaries.stride(1);
  call.stride[2] = summaries.stride(block_table ? 0 : 2);
  call.bounds_stride = summaries.dim() == leading + 2 ? summaries.stride(leading) : 0;
  call.heads = summaries.size(1);
  call.group = call.heads > 0 ? query.size(1) / call.heads : 0;
  call.queries = query.size(2);
  call.blocks = summaries.size(2);
  call.dim = query.size(3);
  if (block_table) {
    call.paged = true;
    call.block_table = global<const int32_t>(*block_table);
    call.table_stride = block_table->stride(0);
    call.num_blocks = summaries.size(0);
    call.blocks = block_table->size(1);
  }
  call.items = query.size(0) * call.heads * call.blocks;
  return call;
}

Tensor score_blocks_cuda(const Tensor& query, const Tensor& summaries,
                         std::optional<Tensor> block_table) {
  check_scoring(query, summaries, block_table, check_device);
  const Stream stream(query);
  const int64_t blocks = block_table ? block_table->size(1) : summaries.size(2);
  Tensor scores = empty({query.size(0), summaries.size(1), blocks}, summaries.scalar_type(), query);
  dispatch_floating(query, [&](auto zero) {
    using T = decltype(zero);
    using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
    auto call = scores_of<T, Real>(query, summaries, block_table);
    call.result = global<Real>(scores);
    launch("score_blocks", score<T, Real>, {ceil_div<int64_t>(call.items, kWarps)}, kThreads,
           stream, call);
  });
  return scores;
}

template <typename Real>
Tensor select_from(const Tensor& scores, const Tensor& seq_lens, const Competition& rule,
                   const Stream& stream) {
  Tensor result = empty({scores.size(0), scores.size(1), rule.k}, ScalarType::Int, scores);
  Selection<Real> call = {};
  call.scores = global<const Real>(scores);
  for (int64_t d = 0; d < 2; ++d) call.stride[d] = scores.stride(d);
  call.seq_lens = global<const int32_t>(seq_lens);
  call.heads = scores.size(1);
  call.width = scores.size(2);
  call.rule = rule;
  call.result = global<int32_t>(result);
  launch("select_blocks", select<Real>, {scores.size(0) * call.heads}, kThreads, stream, call);
  return result;
}

Tensor select_blocks_cuda(const Tensor& scores, int64_t k, const Tensor& seq_lens,
                          int64_t block_size, int64_t sink_blocks, int64_t recent_blocks) {
  check_scores(scores, check_device);
  const bool wide = scores.scalar_type() == ScalarType::Double;
  const Competition rule = competition_of(k, block_size, sink_blocks, recent_blocks);
  check_lengths(seq_lens, scores.size(0), "scores", check_device);
  const Stream stream(scores);
  return wide ? select_from<double>(scores, seq_lens, rule, stream)
              : select_from<float>(scores, seq_lens, rule, stream);
}

Tensor score_select_blocks_cuda(const Tensor& query, const Tensor& summaries, int64_t k,
                                const Tensor& seq_lens, int64_t block_size,
                                std::optional<Tensor> block_table, int64_t sink_blocks,
                                int64_t recent_blocks) {
  check_scoring(query, summaries, block_table, check_device);
  const Competition rule = competition_of(k, block_size, sink_blocks, recent_blocks);
  check_lengths(seq_lens, query.size(0), "query", check_device);
  const Stream stream(query);
  const int64_t blocks = block_table ? block_table->size(1) : summaries.size(2);
  const Tensor scores =
      empty({query.size(0), summaries.size(1), blocks}, summaries.scalar_type(), query);
  Tensor result = empty({0}, ScalarType::Int, query);
  dispatch_floating(query, [&](auto zero) {
    using T = decltype(zero);
    using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
    auto call = scores_of<T, Real>(query, summaries, block_table);
    call.selects = true;
    call.seq_lens = global<const int32_t>(seq_lens);
    call.rule = rule;
    call.result = global<Real>(scores);
    launch("score_select_blocks", score<T, Real>, {ceil_div<int64_t>(call.items, kWarps)}, kThreads,
           stream, call);
    result = select_from<Real>(scores, seq_lens, rule, stream);
  });
  return result;
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("score_blocks", TORCH_BOX(&winnow::score_blocks_cuda));
  m.impl("select_blocks", TORCH_BOX(&winnow::select_blocks_cuda));
  m.impl("score_select_blocks", TORCH_BOX(&winnow::score_select_blocks_cuda));
}
