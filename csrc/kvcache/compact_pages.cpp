// winnow::compact_pages_ on the CPU: the tokens that are kept move to the front of their row, in
// order. No token moves backwards, so each head's go one after another, in place.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "common/checks.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "kvcache/paged_write_arguments.h"

namespace winnow {
namespace {

constexpr int64_t kGrainBytes = 1 << 18;  // about 20 µs of copying for a thread

void compact_pages_(Tensor pages, const Tensor& block_table, const Tensor& keep) {
  const KeepStrides stride_of = check_compaction(pages, block_table, keep, check_cpu);
  const int64_t layers = pages.size(0);
  const int64_t num_blocks = pages.size(1);
  const int64_t heads = pages.size(2);
  const int64_t block_size = pages.size(3);
  const int64_t rows = keep.size(1);
  const int64_t kept = keep.size(3);

  const auto* positions = static_cast<const int64_t*>(keep.data_ptr());
  const auto list_of = [&](int64_t layer, int64_t row, int64_t head) {
    return positions + layer * stride_of.layer + row * stride_of.row + head * stride_of.head;
  };
  const auto* table = static_cast<const int32_t*>(block_table.data_ptr());
  const int64_t table_stride = block_table.stride(0);
  const auto check_block = [&](int64_t row, int64_t i) {
    const bool inside = i / block_size < block_table.size(1);
    const int32_t block = inside ? table[row * table_stride + i / block_size] : -1;
    WINNOW_CHECK(block >= 0 && block < num_blocks, "block_table: expected 0 <= block < ",
                 num_blocks, " at position ", i, " of row ", row, ", got ", block);
  };
  for (int64_t l = 0; l < keep.size(0); ++l) {
    for (int64_t b = 0; b < rows; ++b) {
      for (int64_t h = 0; h < keep.size(2); ++h) {
        const int64_t* list = list_of(l, b, h);
        for (int64_t i = 0; i < kept; ++i) {
          if (list[i] == -1) continue;
          WINNOW_CHECK(list[i] > (i > 0 ? list[i - 1] : -1) && (i == 0 || list[i - 1] >= 0),
                       "keep: expected ascending positions, then -1, got ", list[i], " at ", i,
                       " of row ", b);
          check_block(b, list[i]);
          check_block(b, i);
        }
      }
    }
  }

  const int64_t size = static_cast<int64_t>(pages.element_size());
  const auto bytes = static_cast<size_t>(pages.size(4) * size);
  auto* base = static_cast<char*>(pages.data_ptr());
  int64_t stride[4];
  for (int64_t d = 0; d < 4; ++d) stride[d] = pages.stride(d) * size;
  const auto move = [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t h = n % heads;
      const int64_t b = n / heads % rows;
      const int64_t l = n / heads / rows;
      const int64_t* list = list_of(l, b, h);
      char* head = base + l * stride[0] + h * stride[2];
      for (int64_t i = 0; i < kept && list[i] >= 0; ++i) {
        if (list[i] == i) continue;
        const int64_t from = table[b * table_stride + list[i] / block_size];
        const int64_t to = table[b * table_stride + i / block_size];
        std::memcpy(head + to * stride[1] + i % block_size * stride[3],
                    head + from * stride[1] + list[i] % block_size * stride[3], bytes);
      }
    }
  };
  const int64_t grain = 1 + kGrainBytes / (1 + kept * static_cast<int64_t>(bytes));
  parallel_for(0, layers * rows * heads, grain, move);
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("compact_pages_", TORCH_BOX(&winnow::compact_pages_));
}
