// winnow::block_summaries, score_blocks and select_blocks on the GPU: which blocks a step attends.
// A warp summarises or scores one block of one key head, lanes side by side along D; a thread block
// selects for one key head by ranks, without a sort. Lengths and blocks stay on the device and are
// not checked: what lies outside of the pages counts as no tokens.
#include "common/device.h"

namespace winnow {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

WINNOW_DEVICE int64_t length_of(Global<const int32_t> seq_lens, int64_t row, int64_t most) {
  const int64_t length = static_cast<int32_t>(seq_lens[row]);
  return length < 0 ? 0 : length > most ? most : length;
}

template <typename T, typename Real>
struct Summaries {
  Global<const T> keys;
  int64_t key_stride[3];  // block, head, slot
  Global<const int32_t> block_table;
  int64_t table_stride;
  Global<const int32_t> seq_lens;
  int64_t num_blocks;
  int64_t block_size;
  int64_t heads;
  int64_t width;
  int64_t dim;
  bool minmax;
  int64_t items;
  Global<Real> result;
};

template <typename T, typename Real>
WINNOW_KERNEL(kThreads)
summarise(Summaries<T, Real> call) {
  const int64_t item = block_index() * kWarps + warp_index();
  if (item >= call.items) return;
  const int64_t i = item % call.width;
  const int64_t head = item / call.width % call.heads;
  const int64_t row = item / call.width / call.heads;
  int64_t count = length_of(call.seq_lens, row, call.width * call.block_size) - i * call.block_size;
  count = count < 0 ? 0 : count > call.block_size ? call.block_size : count;
  int64_t block = 0;
  if (count > 0) {
    block = static_cast<int32_t>(call.block_table[row * call.table_stride + i]);
    if (block < 0 || block >= call.num_blocks) count = 0;
  }
  const auto keys = call.keys + block * call.key_stride[0] + head * call.key_stride[1];
  const auto result = call.result + item * call.dim * (call.minmax ? 2 : 1);
  for (int64_t d = lane_index(); d < call.dim; d += kWarp) {
    Real low = Real(0);
    Real high = Real(0);
    Real sum = Real(0);
    for (int64_t s = 0; s < count; ++s) {
      const Real x = static_cast<Real>(static_cast<T>(keys[s * call.key_stride[2] + d]));
      // A NaN stays, because nothing is below or above it.
      if (s == 0 || x < low || x != x) low = x;
      if (s == 0 || x > high || x != x) high = x;
      sum += x;
    }
    if (call.minmax) {
      result[d] = low;
      result[call.dim + d] = high;
    } else {
      result[d] = count > 0 ? sum / static_cast<Real>(count) : Real(0);
    }
  }
}

template <typename T, typename Real>
struct Scores {
  Global<const T> query;
  int64_t query_stride[3];  // batch, head, position
  Global<const Real> summaries;
  int64_t stride[3];      // batch, head, block
  int64_t bounds_stride;  // from the minimum to the maximum; 0 for means
  int64_t group;
  int64_t queries;
  int64_t heads;
  int64_t blocks;
  int64_t dim;
  int64_t items;
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
  const auto low =
      call.summaries + row * call.stride[0] + head * call.stride[1] + i * call.stride[2];
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
  int64_t block_size;
  int64_t k;
  int64_t sinks;
  int64_t recents;
  Global<int32_t> result;
};

template <typename Real>
WINNOW_KERNEL(kThreads)
select(Selection<Real> call) {
  WINNOW_SHARED(Real, tile, kThreads);
  WINNOW_SHARED(int64_t, scratch, kWarps);
  const int64_t head = block_index() % call.heads;
  const int64_t row = block_index() / call.heads;
  const auto scores = call.scores + row * call.stride[0] + head * call.stride[1];
  const auto result = call.result + block_index() * call.k;
  const int64_t blocks =
      ceil_div(length_of(call.seq_lens, row, call.width * call.block_size), call.block_size);
  const int64_t end = blocks - call.recents;  // of those that compete
  const int64_t wanted = call.k - call.sinks - call.recents;
  const bool keeps_all = blocks <= call.k;

  int64_t written = 0;
  for (int64_t first = 0; first < blocks; first += kThreads) {
    const int64_t i = first + thread_index();
    const bool competes = !keeps_all && i >= call.sinks && i < end;
    const Real own = competes ? static_cast<Real>(scores[i]) : Real(0);
    int64_t better = 0;
    for (int64_t from = call.sinks; !keeps_all && from < end; from += kThreads) {
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
  for (int64_t n = written + thread_index(); n < call.k; n += kThreads) result[n] = -1;
}

// ---- launchers ----

void check_integers(const char* name, const Tensor& tensor) {
  check_device(name, tensor);
  check_dtype(name, tensor, ScalarType::Int);
  check_last_contiguous(name, tensor);
}

void check_lengths(const Tensor& seq_lens, int64_t batch, const char* holder) {
  check_integers("seq_lens", seq_lens);
  WINNOW_CHECK(seq_lens.dim() == 1 && seq_lens.size(0) == batch,
               "seq_lens: expected (B,) with B=", batch, " as in ", holder, ", got ",
               shape_of(seq_lens));
}

Tensor block_summaries_cuda(const Tensor& key_pages, const Tensor& block_table,
                            const Tensor& seq_lens, bool minmax) {
  check_device("key_pages", key_pages);
  check_floating("key_pages", key_pages);
  check_dim("key_pages", key_pages, 4, "the pages of one layer, (num_blocks, Hkv, block_size, D)");
  check_last_contiguous("key_pages", key_pages);
  check_integers("block_table", block_table);
  check_dim("block_table", block_table, 2, "(B, max_blocks)");
  WINNOW_CHECK(key_pages.size(2) > 0, "key_pages: expected a block_size of at least 1, got ",
               shape_of(key_pages));
  const int64_t batch = block_table.size(0);
  const int64_t width = block_table.size(1);
  const int64_t heads = key_pages.size(1);
  const int64_t dim = key_pages.size(3);
  check_lengths(seq_lens, batch, "block_table");
  Shape sizes{batch, heads, width, dim};
  if (minmax) sizes = {batch, heads, width, 2, dim};
  const Stream stream(key_pages);
  Tensor result = empty(sizes, statistics_dtype(key_pages), key_pages);
  dispatch_floating(key_pages, [&](auto zero) {
    using T = decltype(zero);
    using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
    Summaries<T, Real> call = {};
    call.keys = global<const T>(key_pages);
    for (int64_t d = 0; d < 3; ++d) call.key_stride[d] = key_pages.stride(d);
    call.block_table = global<const int32_t>(block_table);
    call.table_stride = block_table.stride(0);
    call.seq_lens = global<const int32_t>(seq_lens);
    call.num_blocks = key_pages.size(0);
    call.block_size = key_pages.size(2);
    call.heads = heads;
    call.width = width;
    call.dim = dim;
    call.minmax = minmax;
    call.items = batch * heads * width;
    call.result = global<Real>(result);
    launch("block_summaries", summarise<T, Real>, {ceil_div<int64_t>(call.items, kWarps)}, kThreads,
           stream, call);
  });
  return result;
}

Tensor score_blocks_cuda(const Tensor& query, const Tensor& summaries) {
  check_device("query", query);
  check_floating("query", query);
  check_dim("query", query, 4, "(B, Hq, T, D)");
  check_last_contiguous("query", query);
  check_device("summaries", summaries);
  check_dtype("summaries", summaries, statistics_dtype(query));
  const bool minmax = summaries.dim() == 5;
  const int64_t batch = query.size(0);
  const int64_t dim = query.size(3);
  WINNOW_CHECK((minmax ? summaries.size(3) == 2 && summaries.size(4) == dim
                       : summaries.dim() == 4 && summaries.size(3) == dim) &&
                   summaries.size(0) == batch,
               "summaries: expected (B, Hkv, NB, D) or (B, Hkv, NB, 2, D) with B=", batch,
               " and D=", dim, " as in query, got ", shape_of(summaries));
  check_last_contiguous("summaries", summaries);
  const int64_t heads = summaries.size(1);
  WINNOW_CHECK(heads > 0 ? query.size(1) % heads == 0 : query.size(1) == 0,
               "query: expected a number of heads divisible by the key heads (", heads, "), got ",
               query.size(1));
  const Stream stream(query);
  Tensor scores = empty({batch, heads, summaries.size(2)}, summaries.scalar_type(), query);
  dispatch_floating(query, [&](auto zero) {
    using T = decltype(zero);
    using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
    Scores<T, Real> call = {};
    call.query = global<const T>(query);
    call.summaries = global<const Real>(summaries);
    for (int64_t d = 0; d < 3; ++d) {
      call.query_stride[d] = query.stride(d);
      call.stride[d] = summaries.stride(d);
    }
    call.bounds_stride = minmax ? summaries.stride(3) : 0;
    call.group = heads > 0 ? query.size(1) / heads : 0;
    call.queries = query.size(2);
    call.heads = heads;
    call.blocks = summaries.size(2);
    call.dim = dim;
    call.items = scores.numel();
    call.result = global<Real>(scores);
    launch("score_blocks", score<T, Real>, {ceil_div<int64_t>(call.items, kWarps)}, kThreads,
           stream, call);
  });
  return scores;
}

template <typename Real>
void run_selection(const Tensor& scores, const Tensor& seq_lens, const Tensor& result,
                   Selection<Real> call, const Stream& stream) {
  call.scores = global<const Real>(scores);
  for (int64_t d = 0; d < 2; ++d) call.stride[d] = scores.stride(d);
  call.seq_lens = global<const int32_t>(seq_lens);
  call.heads = scores.size(1);
  call.width = scores.size(2);
  call.result = global<int32_t>(result);
  launch("select_blocks", select<Real>, {scores.size(0) * call.heads}, kThreads, stream, call);
}

Tensor select_blocks_cuda(const Tensor& scores, int64_t k, const Tensor& seq_lens,
                          int64_t block_size, int64_t sink_blocks, int64_t recent_blocks) {
  check_device("scores", scores);
  const bool wide = scores.scalar_type() == ScalarType::Double;
  WINNOW_CHECK(wide || scores.scalar_type() == ScalarType::Float,
               "scores: expected float32 or float64, got ", name_of(scores.scalar_type()));
  check_dim("scores", scores, 3, "(B, Hkv, NB)");
  check_last_contiguous("scores", scores);
  WINNOW_CHECK(block_size >= 1, "block_size: expected at least 1, got ", block_size);
  WINNOW_CHECK(sink_blocks >= 0, "sink_blocks: expected at least 0, got ", sink_blocks);
  WINNOW_CHECK(recent_blocks >= 0, "recent_blocks: expected at least 0, got ", recent_blocks);
  WINNOW_CHECK(k >= 0 && k - sink_blocks >= recent_blocks, "k: expected at least sink_blocks + ",
               "recent_blocks = ", sink_blocks, " + ", recent_blocks, ", got ", k);
  check_lengths(seq_lens, scores.size(0), "scores");
  const Stream stream(scores);
  Tensor result = empty({scores.size(0), scores.size(1), k}, ScalarType::Int, scores);
  const auto run = [&](auto zero) {
    Selection<decltype(zero)> call = {};
    call.block_size = block_size;
    call.k = k;
    call.sinks = sink_blocks;
    call.recents = recent_blocks;
    run_selection(scores, seq_lens, result, call, stream);
  };
  if (wide) {
    run(double{});
  } else {
    run(float{});
  }
  return result;
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("block_summaries", TORCH_BOX(&winnow::block_summaries_cuda));
  m.impl("score_blocks", TORCH_BOX(&winnow::score_blocks_cuda));
  m.impl("select_blocks", TORCH_BOX(&winnow::select_blocks_cuda));
}
