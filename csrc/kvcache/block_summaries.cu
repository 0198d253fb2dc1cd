// winnow::block_summaries and update_block_summaries_ on the GPU: the keys of a block in short, for
// all blocks of a table or for those that were written to. A warp summarises one block of one key
// head, lanes side by side along D.
#include <optional>

#include "kvcache/block_summaries_arguments.h"
#include "kvcache/block_table.cuh"

namespace winnow {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

template <typename T, typename Real>
struct Summaries {
  Global<const T> keys;
  int64_t key_stride[3];           // block, head, slot
  Global<const float> key_scales;  // of codes
  int64_t scale_stride[2];         // block, head
  Global<const int32_t> block_table;
  int64_t table_stride;
  Global<const int32_t> seq_lens;
  Global<const int64_t> positions;  // of what was written; of update_block_summaries_ only
  int64_t positions_stride;
  int64_t tokens;
  int64_t num_blocks;
  int64_t block_size;
  int64_t heads;
  int64_t width;
  int64_t dim;
  bool minmax;
  int64_t items;
  Global<Real> result;
  int64_t result_stride[2];  // block, head; of update_block_summaries_ only
};

// Where a row has tokens in its logical block i: in which block of the pages, and how many.
struct Held {
  int64_t block;
  int64_t count;
};

template <typename T, typename Real>
WINNOW_DEVICE Held held_in(const Summaries<T, Real>& call, int64_t row, int64_t i) {
  int64_t count = length_of(call.seq_lens, row, call.width * call.block_size) - i * call.block_size;
  count = count < 0 ? 0 : count > call.block_size ? call.block_size : count;
  int64_t block = 0;
  if (count > 0) {
    block = static_cast<int32_t>(call.block_table[row * call.table_stride + i]);
    if (block < 0 || block >= call.num_blocks) count = 0;
  }
  return {count > 0 ? block : 0, count};
}

template <typename T, typename Real>
WINNOW_DEVICE void summarise(const Summaries<T, Real>& call, Held held, int64_t head,
                             Global<Real> result) {
  const auto keys = call.keys + held.block * call.key_stride[0] + head * call.key_stride[1];
  Real scale = Real(1);
  if constexpr (kCoded<T>) {
    scale = call.key_scales[held.block * call.scale_stride[0] + head * call.scale_stride[1]];
  }
  for (int64_t d = lane_index(); d < call.dim; d += kWarp) {
    Real low = Real(0);
    Real high = Real(0);
    Real sum = Real(0);
    for (int64_t s = 0; s < held.count; ++s) {
      const T key = keys[s * call.key_stride[2] + d];
      Real x;
      if constexpr (kCoded<T>) {
        x = number_of(key);
      } else {
        x = static_cast<Real>(key);
      }
      // A NaN stays, because nothing is below or above it.
      if (s == 0 || x < low || x != x) low = x;
      if (s == 0 || x > high || x != x) high = x;
      sum += x;
    }
    if (call.minmax) {
      result[d] = low * scale;
      result[call.dim + d] = high * scale;
    } else {
      result[d] = held.count > 0 ? sum / static_cast<Real>(held.count) * scale : Real(0);
    }
  }
}

template <typename T, typename Real>
WINNOW_KERNEL(kThreads)
summarise_all(Summaries<T, Real> call) {
  const int64_t item = block_index() * kWarps + warp_index();
  if (item >= call.items) return;
  const int64_t i = item % call.width;
  const int64_t head = item / call.width % call.heads;
  const int64_t row = item / call.width / call.heads;
  summarise(call, held_in(call, row, i), head,
            call.result + item * call.dim * (call.minmax ? 2 : 1));
}

// A warp per token and key head. The first token of a block among the row's does the work; for
// ascending positions its neighbour tells all others that they are not.
template <typename T, typename Real>
WINNOW_KERNEL(kThreads)
summarise_written(Summaries<T, Real> call) {
  const int64_t item = block_index() * kWarps + warp_index();
  if (item >= call.items) return;
  const int64_t token = item % call.tokens;
  const int64_t head = item / call.tokens % call.heads;
  const int64_t row = item / call.tokens / call.heads;
  const auto positions = call.positions + row * call.positions_stride;
  const int64_t position = positions[token];
  if (position < 0 || position >= call.width * call.block_size) return;
  const int64_t i = position / call.block_size;
  for (int64_t last = token; last > 0; last -= kWarp) {
    const int64_t t = last - 1 - lane_index();
    const int64_t other = t >= 0 ? static_cast<int64_t>(positions[t]) : -1;
    if (ballot(kFullWarp, other >= 0 && other / call.block_size == i) != 0) return;
  }
  const Held held = held_in(call, row, i);
  if (held.count == 0) return;
  summarise(call, held, head,
            call.result + held.block * call.result_stride[0] + head * call.result_stride[1]);
}

// ---- launchers ----

template <typename T, typename Real>
Summaries<T, Real> call_of(const Tensor& key_pages, const Tensor& block_table,
                           const Tensor& seq_lens, bool minmax,
                           const std::optional<Tensor>& key_scales) {
  Summaries<T, Real> call = {};
  call.keys = global<const T>(key_pages);
  if (key_scales) {
    call.key_scales = global<const float>(*key_scales);
    for (int64_t d = 0; d < 2; ++d) call.scale_stride[d] = key_scales->stride(d);
  }
  for (int64_t d = 0; d < 3; ++d) call.key_stride[d] = key_pages.stride(d);
  call.block_table = global<const int32_t>(block_table);
  call.table_stride = block_table.stride(0);
  call.seq_lens = global<const int32_t>(seq_lens);
  call.num_blocks = key_pages.size(0);
  call.block_size = key_pages.size(2);
  call.heads = key_pages.size(1);
  call.width = block_table.size(1);
  call.dim = key_pages.size(3);
  call.minmax = minmax;
  return call;
}

// fn receives T{} of the pages.
template <typename Fn>
void dispatch_pages(const Tensor& key_pages, const Fn& fn) {
  if (!holds_codes(key_pages)) {
    dispatch_floating(key_pages, fn);
  } else {
    dispatch_codes(code_type("key_pages", key_pages), fn);
  }
}

Tensor block_summaries_cuda(const Tensor& key_pages, const Tensor& block_table,
                            const Tensor& seq_lens, bool minmax, std::optional<Tensor> key_scales) {
  check_summarised(key_pages, block_table, seq_lens, key_scales, check_device);
  const int64_t batch = block_table.size(0);
  const int64_t width = block_table.size(1);
  const int64_t heads = key_pages.size(1);
  const int64_t dim = key_pages.size(3);
  Shape sizes{batch, heads, width, dim};
  if (minmax) sizes = {batch, heads, width, 2, dim};
  const Stream stream(key_pages);
  Tensor result = empty(sizes, statistics_dtype(key_pages), key_pages);
  dispatch_pages(key_pages, [&](auto zero) {
    using T = decltype(zero);
    using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
    auto call = call_of<T, Real>(key_pages, block_table, seq_lens, minmax, key_scales);
    call.items = batch * heads * width;
    call.result = global<Real>(result);
    launch("block_summaries", summarise_all<T, Real>, {ceil_div<int64_t>(call.items, kWarps)},
           kThreads, stream, call);
  });
  return result;
}

void update_block_summaries_cuda(Tensor summaries, const Tensor& key_pages,
                                 const Tensor& block_table, const Tensor& seq_lens,
                                 const Tensor& positions, std::optional<Tensor> key_scales) {
  check_summarised(key_pages, block_table, seq_lens, key_scales, check_device);
  const bool minmax = check_kept(summaries, key_pages, block_table, positions, check_device);
  const Stream stream(key_pages);
  dispatch_pages(key_pages, [&](auto zero) {
    using T = decltype(zero);
    using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
    auto call = call_of<T, Real>(key_pages, block_table, seq_lens, minmax, key_scales);
    call.positions = global<const int64_t>(positions);
    call.positions_stride = positions.stride(0);
    call.tokens = positions.size(1);
    call.items = positions.numel() * call.heads;
    call.result = global<Real>(summaries);
    for (int64_t d = 0; d < 2; ++d) call.result_stride[d] = summaries.stride(d);
    launch("update_block_summaries_", summarise_written<T, Real>,
           {ceil_div<int64_t>(call.items, kWarps)}, kThreads, stream, call);
  });
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("block_summaries", TORCH_BOX(&winnow::block_summaries_cuda));
  m.impl("update_block_summaries_", TORCH_BOX(&winnow::update_block_summaries_cuda));
}
