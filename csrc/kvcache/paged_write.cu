// What moves bytes of pages on the GPU. Of winnow::paged_write_ a warp moves one token of one head,
// of winnow::copy_blocks_ one slot of a block, keys and values alike; of winnow::compact_pages_ a
// thread block moves the tokens of one head, row and layer. Positions and blocks stay on the
// device, so what they hold is not checked: an index outside of the pages moves nothing.
#include <algorithm>
#include <initializer_list>

#include "kvcache/block_table.cuh"
#include "kvcache/paged_write_arguments.h"
#include "kvcache/write_positions.cuh"

namespace winnow {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTokens = 4;  // that a warp compacts at a turn

// Both are moved as units of `Unit`, the largest that divides every stride. Strides in units.
template <typename Unit>
struct Tokens {
  Global<const Unit> from;  // (B, Hkv, T, D)
  int64_t from_stride[3];
  Global<Unit> pages;  // (num_blocks, Hkv, block_size, D)
  int64_t page_stride[3];
  int64_t units;
};

template <typename Unit>
WINNOW_DEVICE void copy_units(Global<Unit> to, Global<const Unit> from, int64_t units) {
  for (int64_t u = lane_index(); u < units; u += kWarp) {
    const Unit unit = from[u];
    to[u] = unit;
  }
}

template <typename Unit>
WINNOW_KERNEL(kThreads)
write_tokens(Tokens<Unit> keys, Tokens<Unit> values, Positions where) {
  const int64_t item = block_index() * kWarps + warp_index();
  if (item >= where.items) return;
  const int64_t token = item % where.tokens;
  const int64_t head = item / where.tokens % where.heads;
  const int64_t row = item / where.tokens / where.heads;
  const int64_t position = where.at(row, token);
  if (position < 0) return;
  const int32_t block = where.block_table[row * where.table_stride + position / where.block_size];
  if (block < 0 || block >= where.num_blocks) return;
  const int64_t slot = position % where.block_size;
  const auto move = [&](const Tokens<Unit>& stream) {
    copy_units<Unit>(stream.pages + block * stream.page_stride[0] + head * stream.page_stride[1] +
                         slot * stream.page_stride[2],
                     stream.from + row * stream.from_stride[0] + head * stream.from_stride[1] +
                         token * stream.from_stride[2],
                     stream.units);
  };
  move(keys);
  move(values);
}

// (num_layers, num_blocks, Hkv, block_size, D); strides in units.
template <typename Unit>
struct Pages {
  Global<Unit> pages;
  int64_t stride[4];
  int64_t units;
};

struct Copies {
  Global<const int64_t> source;
  Global<const int64_t> target;
  int64_t count;
  int64_t num_blocks;
  int64_t heads;
  int64_t block_size;
  int64_t items;
};

template <typename Unit>
WINNOW_KERNEL(kThreads)
copy_slots(Pages<Unit> keys, Pages<Unit> values, Copies copies) {
  const int64_t item = block_index() * kWarps + warp_index();
  if (item >= copies.items) return;
  const int64_t slot = item % copies.block_size;
  const int64_t head = item / copies.block_size % copies.heads;
  const int64_t copy = item / copies.block_size / copies.heads % copies.count;
  const int64_t layer = item / copies.block_size / copies.heads / copies.count;
  const int64_t from = copies.source[copy];
  const int64_t to = copies.target[copy];
  if (from < 0 || from >= copies.num_blocks || to < 0 || to >= copies.num_blocks) return;
  const auto move = [&](const Pages<Unit>& stream) {
    const auto slots =
        stream.pages + layer * stream.stride[0] + head * stream.stride[2] + slot * stream.stride[3];
    copy_units<Unit>(slots + to * stream.stride[1], slots + from * stream.stride[1], stream.units);
  };
  move(keys);
  move(values);
}

// Strides in units.
template <typename Unit>
struct Compaction {
  Global<Unit> pages;  // (num_layers, num_blocks, Hkv, block_size, D)
  int64_t stride[4];
  int64_t units;
  Global<const int64_t> keep;
  KeepStrides keep_stride;
  int64_t kept;
  Global<const int32_t> table;
  int64_t table_stride;
  int64_t table_width;
  int64_t num_blocks;
  int64_t block_size;
  int64_t heads;
  int64_t rows;
};

// 32 tokens a turn: all are read before one is written. What a turn writes no later one reads,
// because no token moves backwards.
template <typename Unit>
WINNOW_KERNEL(kThreads)
compact(Compaction<Unit> call) {
  const int64_t head = block_index() % call.heads;
  const int64_t row = block_index() / call.heads % call.rows;
  const int64_t layer = block_index() / call.heads / call.rows;
  const auto list = call.keep + layer * call.keep_stride.layer + row * call.keep_stride.row +
                    head * call.keep_stride.head;
  const auto pages = call.pages + layer * call.stride[0] + head * call.stride[2];
  for (int64_t first = 0; first < call.kept; first += kWarps * kTokens) {
    int64_t from[kTokens];
    int64_t to[kTokens];
#pragma unroll
    for (int n = 0; n < kTokens; ++n) {
      const int64_t i = first + warp_index() * kTokens + n;
      const int64_t position = i < call.kept ? static_cast<int64_t>(list[i]) : -1;
      from[n] = to[n] = -1;
      if (position <= i || position >= call.table_width * call.block_size) continue;
      const auto table = call.table + row * call.table_stride;
      const int64_t source = static_cast<int32_t>(table[position / call.block_size]);
      const int64_t target = static_cast<int32_t>(table[i / call.block_size]);
      if (source < 0 || source >= call.num_blocks || target < 0 || target >= call.num_blocks) {
        continue;
      }
      from[n] = source * call.stride[1] + position % call.block_size * call.stride[3];
      to[n] = target * call.stride[1] + i % call.block_size * call.stride[3];
    }
    for (int64_t unit = 0; unit < call.units; unit += kWarp) {
      const int64_t u = unit + lane_index();
      Unit held[kTokens];
#pragma unroll
      for (int n = 0; n < kTokens; ++n) {
        if (to[n] >= 0 && u < call.units) held[n] = pages[from[n] + u];
      }
      block_sync();
#pragma unroll
      for (int n = 0; n < kTokens; ++n) {
        if (to[n] >= 0 && u < call.units) pages[to[n] + u] = held[n];
      }
    }
  }
}

// ---- launchers ----

// Whether address, last dimension and every other stride are multiples of 16 bytes.
bool moves_by_16(const Tensor& tensor) {
  const auto size = static_cast<int64_t>(tensor.element_size());
  const int64_t last = tensor.dim() - 1;
  bool fits = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  fits = fits && tensor.size(last) * size % 16 == 0;
  for (int64_t d = 0; d < last; ++d) {
    fits = fits && (tensor.size(d) <= 1 || tensor.stride(d) * size % 16 == 0);
  }
  return fits;
}

// fn receives a unit that all tensors can be moved by: 16 bytes, or the smallest element.
template <typename Fn>
void dispatch_unit(std::initializer_list<const Tensor*> tensors, const Fn& fn) {
  bool wide = true;
  size_t smallest = sizeof(uint64_t);
  for (const Tensor* tensor : tensors) {
    wide = wide && moves_by_16(*tensor);
    smallest = std::min<size_t>(smallest, tensor->element_size());
  }
  if (wide) return fn(Vector<uint32_t, 4>{});
  switch (smallest) {
    case 1:
      return fn(uint8_t{});
    case 2:
      return fn(uint16_t{});
    case 4:
      return fn(uint32_t{});
    default:
      return fn(uint64_t{});
  }
}

template <typename Unit>
int64_t in_units(const Tensor& tensor, int64_t elements) {
  return elements * static_cast<int64_t>(tensor.element_size()) /
         static_cast<int64_t>(sizeof(Unit));
}

template <typename Unit>
Tokens<Unit> tokens_of(const Tensor& from, const Tensor& pages) {
  Tokens<Unit> tokens = {};
  tokens.from = global<const Unit>(from);
  tokens.pages = global<Unit>(pages);
  for (int64_t d = 0; d < 3; ++d) {
    tokens.from_stride[d] = in_units<Unit>(from, from.stride(d));
    tokens.page_stride[d] = in_units<Unit>(pages, pages.stride(d));
  }
  tokens.units = in_units<Unit>(from, from.size(3));
  return tokens;
}

template <typename Unit>
Pages<Unit> pages_of(const Tensor& tensor) {
  Pages<Unit> pages = {};
  pages.pages = global<Unit>(tensor);
  for (int64_t d = 0; d < 4; ++d) pages.stride[d] = in_units<Unit>(tensor, tensor.stride(d));
  pages.units = in_units<Unit>(tensor, tensor.size(4));
  return pages;
}

void paged_write_cuda(Tensor key_pages, Tensor value_pages, const Tensor& key, const Tensor& value,
                      const Tensor& block_table, const Tensor& positions) {
  check_write(key_pages, value_pages, key, value, block_table, positions, check_device);
  check_dtype("key", key, key_pages.scalar_type());
  check_dtype("value", value, value_pages.scalar_type());
  const Stream stream(key);
  const Positions where = positions_of(key, key_pages, block_table, positions);
  dispatch_unit({&key, &key_pages, &value, &value_pages}, [&](auto zero) {
    using Unit = decltype(zero);
    launch("paged_write_", write_tokens<Unit>, {ceil_div<int64_t>(where.items, kWarps)}, kThreads,
           stream, tokens_of<Unit>(key, key_pages), tokens_of<Unit>(value, value_pages), where);
  });
}

void copy_blocks_cuda(Tensor key_pages, Tensor value_pages, const Tensor& source,
                      const Tensor& target) {
  check_copies(key_pages, value_pages, source, target, check_device);
  const int64_t count = source.size(0);
  const Stream stream(key_pages);
  const Copies copies = {global<const int64_t>(source),
                         global<const int64_t>(target),
                         count,
                         key_pages.size(1),
                         key_pages.size(2),
                         key_pages.size(3),
                         key_pages.size(0) * count * key_pages.size(2) * key_pages.size(3)};
  dispatch_unit({&key_pages, &value_pages}, [&](auto zero) {
    using Unit = decltype(zero);
    launch("copy_blocks_", copy_slots<Unit>, {ceil_div<int64_t>(copies.items, kWarps)}, kThreads,
           stream, pages_of<Unit>(key_pages), pages_of<Unit>(value_pages), copies);
  });
}

void compact_pages_cuda(Tensor pages, const Tensor& block_table, const Tensor& keep) {
  const KeepStrides strides = check_compaction(pages, block_table, keep, check_device);
  const int64_t layers = pages.size(0);
  const int64_t heads = pages.size(2);
  const int64_t rows = keep.size(1);
  const Stream stream(pages);
  dispatch_unit({&pages}, [&](auto zero) {
    using Unit = decltype(zero);
    Compaction<Unit> call = {};
    call.pages = global<Unit>(pages);
    for (int64_t d = 0; d < 4; ++d) call.stride[d] = in_units<Unit>(pages, pages.stride(d));
    call.units = in_units<Unit>(pages, pages.size(4));
    call.keep = global<const int64_t>(keep);
    call.keep_stride = strides;
    call.kept = keep.size(3);
    call.table = global<const int32_t>(block_table);
    call.table_stride = block_table.stride(0);
    call.table_width = block_table.size(1);
    call.num_blocks = pages.size(1);
    call.block_size = pages.size(3);
    call.heads = heads;
    call.rows = rows;
    launch("compact_pages_", compact<Unit>, {layers * rows * heads}, kThreads, stream, call);
  });
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("paged_write_", TORCH_BOX(&winnow::paged_write_cuda));
  m.impl("copy_blocks_", TORCH_BOX(&winnow::copy_blocks_cuda));
  m.impl("compact_pages_", TORCH_BOX(&winnow::compact_pages_cuda));
}
