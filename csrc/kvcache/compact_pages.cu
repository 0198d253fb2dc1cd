// winnow::compact_pages_ on the GPU. A thread block moves the tokens of one head, row and layer, 32
// a turn: all are read before one is written. What a turn writes no later one reads, because no
// token moves backwards. Positions and blocks stay on the device and are not checked: an index from
// outside moves nothing.
#include "kvcache/block_table.cuh"

namespace winnow {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kTokens = 4;  // of a warp at a turn

// Pages move as units of `Unit`; strides in units.
template <typename Unit>
struct Compaction {
  Global<Unit> pages;  // (num_layers, num_blocks, Hkv, block_size, D)
  int64_t stride[4];
  int64_t units;
  Global<const int64_t> keep;
  int64_t keep_stride[3];  // layer, row, head; 0 where shared
  int64_t kept;
  Global<const int32_t> source_table;
  int64_t source_stride;
  int64_t source_width;
  Global<const int32_t> target_table;
  int64_t target_stride;
  int64_t target_width;
  int64_t num_blocks;
  int64_t block_size;
  int64_t heads;
  int64_t rows;
};

template <typename Unit>
WINNOW_KERNEL(kThreads)
compact(Compaction<Unit> call) {
  const int64_t head = block_index() % call.heads;
  const int64_t row = block_index() / call.heads % call.rows;
  const int64_t layer = block_index() / call.heads / call.rows;
  const auto list = call.keep + layer * call.keep_stride[0] + row * call.keep_stride[1] +
                    head * call.keep_stride[2];
  const auto pages = call.pages + layer * call.stride[0] + head * call.stride[2];
  for (int64_t first = 0; first < call.kept; first += kWarps * kTokens) {
    int64_t from[kTokens];
    int64_t to[kTokens];
#pragma unroll
    for (int n = 0; n < kTokens; ++n) {
      const int64_t i = first + warp_index() * kTokens + n;
      const int64_t position = i < call.kept ? static_cast<int64_t>(list[i]) : -1;
      from[n] = to[n] = -1;
      if (position < i || position >= call.source_width * call.block_size ||
          i >= call.target_width * call.block_size) {
        continue;
      }
      const int64_t source = static_cast<int32_t>(
          call.source_table[row * call.source_stride + position / call.block_size]);
      const int64_t target =
          static_cast<int32_t>(call.target_table[row * call.target_stride + i / call.block_size]);
      if (source < 0 || source >= call.num_blocks || target < 0 || target >= call.num_blocks ||
          (source == target && position == i)) {
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

// ---- launcher ----

// Whether address, last dimension and every other stride are multiples of 16 bytes.
bool moves_by_16(const Tensor& pages) {
  const auto size = static_cast<int64_t>(pages.element_size());
  bool fits = reinterpret_cast<uintptr_t>(pages.data_ptr()) % 16 == 0;
  fits = fits && pages.size(4) * size % 16 == 0;
  for (int64_t d = 0; d < 4; ++d) {
    fits = fits && (pages.size(d) <= 1 || pages.stride(d) * size % 16 == 0);
  }
  return fits;
}

template <typename Fn>
void dispatch_unit(const Tensor& pages, const Fn& fn) {
  if (moves_by_16(pages)) return fn(Vector<uint32_t, 4>{});
  switch (pages.element_size()) {
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

void compact_pages_cuda(Tensor pages, const Tensor& source_table, const Tensor& target_table,
                        const Tensor& keep) {
  check_device("pages", pages);
  check_dim("pages", pages, 5, "(num_layers, num_blocks, Hkv, block_size, D)");
  check_last_contiguous("pages", pages);
  const int64_t layers = pages.size(0);
  const int64_t heads = pages.size(2);
  WINNOW_CHECK(pages.size(3) > 0, "pages: expected a block_size of at least 1, got ",
               shape_of(pages));
  check_device("keep", keep);
  check_dtype("keep", keep, ScalarType::Long);
  WINNOW_CHECK(keep.dim() == 4 && (keep.size(0) == layers || keep.size(0) == 1) &&
                   (keep.size(2) == heads || keep.size(2) == 1),
               "keep: expected (num_layers or 1, B, Hkv or 1, K) with num_layers=", layers,
               " and Hkv=", heads, " as in pages, got ", shape_of(keep));
  check_last_contiguous("keep", keep);
  const int64_t rows = keep.size(1);
  const auto check_rows = [&](const char* name, const Tensor& table) {
    check_integers(name, table);
    WINNOW_CHECK(table.dim() == 2 && table.size(0) == rows, name,
                 ": expected (B, max_blocks) with B=", rows, " as in keep, got ", shape_of(table));
  };
  check_rows("source_table", source_table);
  check_rows("target_table", target_table);
  const Stream stream(pages);
  dispatch_unit(pages, [&](auto zero) {
    using Unit = decltype(zero);
    const auto size = static_cast<int64_t>(pages.element_size());
    const auto unit = static_cast<int64_t>(sizeof(Unit));
    Compaction<Unit> call = {};
    call.pages = global<Unit>(pages);
    for (int64_t d = 0; d < 4; ++d) call.stride[d] = pages.stride(d) * size / unit;
    call.units = pages.size(4) * size / unit;
    call.keep = global<const int64_t>(keep);
    call.keep_stride[0] = keep.size(0) == 1 ? 0 : keep.stride(0);
    call.keep_stride[1] = keep.stride(1);
    call.keep_stride[2] = keep.size(2) == 1 ? 0 : keep.stride(2);
    call.kept = keep.size(3);
    call.source_table = global<const int32_t>(source_table);
    call.source_stride = source_table.stride(0);
    call.source_width = source_table.size(1);
    call.target_table = global<const int32_t>(target_table);
    call.target_stride = target_table.stride(0);
    call.target_width = target_table.size(1);
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
  m.impl("compact_pages_", TORCH_BOX(&winnow::compact_pages_cuda));
}
