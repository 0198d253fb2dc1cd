// winnow::paged_write_ stores new tokens in their pages; winnow::copy_blocks_ copies whole blocks,
// of all layers, before one of their owners writes. Both move bytes and nothing else.
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

int64_t grain_for(int64_t bytes) {
  return 1 + kGrainBytes / std::max<int64_t>(1, bytes);
}

// A copy of a compile-time size is a few vector moves; a call of memcpy per head costs more than
// the bytes of a single token.
void copy_row(char* to, const char* from, int64_t bytes) {
  while (bytes >= 64) {
    std::memcpy(to, from, 64);
    to += 64;
    from += 64;
    bytes -= 64;
  }
  if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
}

// One of the two (pages, new tokens) pairs of an append.
struct Stream {
  char* pages;
  int64_t block_bytes;
  int64_t page_head_bytes;
  int64_t slot_bytes;
  const char* tokens;
  int64_t row_bytes;
  int64_t head_bytes;
  int64_t token_bytes;
  int64_t bytes;  // of one token of one head

  Stream(const Tensor& to, const Tensor& from) {
    const int64_t size = static_cast<int64_t>(to.element_size());
    pages = static_cast<char*>(to.data_ptr());
    block_bytes = to.stride(0) * size;
    page_head_bytes = to.stride(1) * size;
    slot_bytes = to.stride(2) * size;
    tokens = static_cast<const char*>(from.data_ptr());
    row_bytes = from.stride(0) * size;
    head_bytes = from.stride(1) * size;
    token_bytes = from.stride(2) * size;
    bytes = from.size(3) * size;
  }

  void store(int64_t row, int64_t head, int64_t token, int64_t block, int64_t slot) const {
    copy_row(pages + block * block_bytes + head * page_head_bytes + slot * slot_bytes,
             tokens + row * row_bytes + head * head_bytes + token * token_bytes, bytes);
  }
};

void paged_write_(Tensor key_pages, Tensor value_pages, const Tensor& key, const Tensor& value,
                  const Tensor& block_table, const Tensor& positions) {
  check_write(key_pages, value_pages, key, value, block_table, positions, check_cpu);
  check_dtype("key", key, key_pages.scalar_type());
  check_dtype("value", value, value_pages.scalar_type());
  check_places(block_table, positions, key_pages.size(0), key_pages.size(2));

  const auto* table = static_cast<const int32_t*>(block_table.data_ptr());
  const auto* where = static_cast<const int64_t*>(positions.data_ptr());
  const int64_t rows = key.size(0);
  const int64_t tokens = key.size(2);
  const int64_t table_stride = block_table.stride(0);
  const int64_t where_stride = positions.stride(0);
  const int64_t block_size = key_pages.size(2);
  const Stream keys(key_pages, key);
  const Stream values(value_pages, value);
  const int64_t heads = key.size(1);
  const auto store = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / heads;
      const int64_t h = i % heads;
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t position = where[b * where_stride + t];
        if (position < 0) continue;
        const int64_t block = table[b * table_stride + position / block_size];
        keys.store(b, h, t, block, position % block_size);
        values.store(b, h, t, block, position % block_size);
      }
    }
  };
  parallel_for(0, rows * heads, grain_for(tokens * (keys.bytes + values.bytes)), store);
}

// Copies blocks of (num_layers, num_blocks, Hkv, block_size, D) pages, one (layer, copy) at a time.
void copy_pages(const Tensor& pages, const int64_t* source, const int64_t* target, int64_t copies) {
  const int64_t size = static_cast<int64_t>(pages.element_size());
  const int64_t heads = pages.size(2);
  const int64_t slots = pages.size(3);
  const int64_t bytes = pages.size(4) * size;
  auto* base = static_cast<char*>(pages.data_ptr());
  const int64_t layer_bytes = pages.stride(0) * size;
  const int64_t block_bytes = pages.stride(1) * size;
  const int64_t head_bytes = pages.stride(2) * size;
  const int64_t slot_bytes = pages.stride(3) * size;
  const auto copy = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      char* layer = base + i / copies * layer_bytes;
      const char* from = layer + source[i % copies] * block_bytes;
      char* to = layer + target[i % copies] * block_bytes;
      for (int64_t h = 0; h < heads; ++h) {
        for (int64_t s = 0; s < slots; ++s) {
          const int64_t offset = h * head_bytes + s * slot_bytes;
          copy_row(to + offset, from + offset, bytes);
        }
      }
    }
  };
  parallel_for(0, pages.size(0) * copies, grain_for(heads * slots * bytes), copy);
}

void check_inside(const char* name, const Tensor& blocks, int64_t num_blocks) {
  const auto* p = static_cast<const int64_t*>(blocks.data_ptr());
  for (int64_t i = 0; i < blocks.size(0); ++i) {
    WINNOW_CHECK(p[i] >= 0 && p[i] < num_blocks, name, ": expected 0 <= block < ", num_blocks,
                 ", got ", p[i]);
  }
}

void copy_blocks_(Tensor key_pages, Tensor value_pages, const Tensor& source,
                  const Tensor& target) {
  check_copies(key_pages, value_pages, source, target, check_cpu);
  check_inside("source", source, key_pages.size(1));
  check_inside("target", target, key_pages.size(1));
  const int64_t copies = source.size(0);
  if (copies == 0) return;
  const auto* from = static_cast<const int64_t*>(source.data_ptr());
  const auto* to = static_cast<const int64_t*>(target.data_ptr());
  copy_pages(key_pages, from, to, copies);
  copy_pages(value_pages, from, to, copies);
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("paged_write_", TORCH_BOX(&winnow::paged_write_));
  m.impl("copy_blocks_", TORCH_BOX(&winnow::copy_blocks_));
}
