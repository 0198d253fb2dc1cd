// winnow::paged_quantise_ stores new tokens in quantised pages. A block's scale grows with what it
// holds, so a task is what one row stores in one block, of one head; the loop is in
// paged_quantise_simd.cc.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "kvcache/paged_quantise_simd.h"
#include "kvcache/paged_write_arguments.h"
#include "kvcache/quantised.h"

namespace winnow {
namespace {

constexpr int64_t kGrainNumbers = 1 << 14;  // about 20 µs of quantising for a thread

CodePages pages_of(const char* name, const Tensor& pages, const char* scales_name,
                   const Tensor& scales) {
  check_cpu(scales_name, scales);
  check_scales(scales_name, scales, pages);
  CodePages result{};
  result.type = code_type(name, pages);
  result.codes = pages.data_ptr();
  for (int64_t d = 0; d < 3; ++d) result.stride[d] = pages.stride(d);
  result.scales = static_cast<float*>(scales.data_ptr());
  for (int64_t d = 0; d < 2; ++d) result.scale_stride[d] = scales.stride(d);
  result.block_size = pages.size(2);
  return result;
}

NewTokens tokens_of(const char* name, const Tensor& tokens) {
  check_floating(name, tokens);
  WINNOW_CHECK(tokens.scalar_type() != ScalarType::Double, name,
               ": expected float32, bfloat16 or float16, got float64");
  NewTokens result{};
  result.type = element_type(tokens);
  result.tokens = tokens.data_ptr();
  for (int64_t d = 0; d < 3; ++d) result.stride[d] = tokens.stride(d);
  result.dim = tokens.size(3);
  return result;
}

// What each row stores in each block; `tokens` is their memory.
std::vector<BlockWrite> make_writes(const Tensor& block_table, const Tensor& positions,
                                    int64_t block_size, std::vector<SlotToken>* tokens) {
  const auto* table = static_cast<const int32_t*>(block_table.data_ptr());
  const auto* where = static_cast<const int64_t*>(positions.data_ptr());
  const int64_t count = positions.size(1);
  struct Place {
    int64_t position;
    int64_t token;
  };
  std::vector<Place> places;
  std::vector<BlockWrite> writes;
  tokens->reserve(static_cast<size_t>(positions.numel()));  // writes point into it
  for (int64_t b = 0; b < positions.size(0); ++b) {
    places.clear();
    for (int64_t t = 0; t < count; ++t) {
      const int64_t position = where[b * positions.stride(0) + t];
      if (position >= 0) places.push_back({position, t});
    }
    std::stable_sort(places.begin(), places.end(),
                     [](const Place& a, const Place& b) { return a.position < b.position; });
    for (size_t i = 0; i < places.size();) {
      const int64_t entry = places[i].position / block_size;
      BlockWrite write{b, table[b * block_table.stride(0) + entry], tokens->data() + tokens->size(),
                       0, false};
      int64_t slots = 0;
      for (; i < places.size() && places[i].position / block_size == entry; ++i) {
        slots += write.count == 0 || places[i].position != places[i - 1].position;
        tokens->push_back({places[i].position % block_size, places[i].token});
        ++write.count;
      }
      write.whole = slots == block_size;
      writes.push_back(write);
    }
  }
  return writes;
}

// A scale has one writer.
void check_distinct(const std::vector<BlockWrite>& writes) {
  std::vector<const BlockWrite*> order;
  order.reserve(writes.size());
  for (const BlockWrite& write : writes) order.push_back(&write);
  std::sort(order.begin(), order.end(),
            [](const BlockWrite* a, const BlockWrite* b) { return a->block < b->block; });
  for (size_t i = 1; i < order.size(); ++i) {
    WINNOW_CHECK(order[i - 1]->block != order[i]->block,
                 "block_table: expected blocks of one owner where tokens are stored, got block ",
                 order[i]->block, " in rows ", std::min(order[i - 1]->row, order[i]->row), " and ",
                 std::max(order[i - 1]->row, order[i]->row));
  }
}

void paged_quantise_(Tensor key_pages, Tensor value_pages, Tensor key_scales, Tensor value_scales,
                     const Tensor& key, const Tensor& value, const Tensor& block_table,
                     const Tensor& positions) {
  check_write(key_pages, value_pages, key, value, block_table, positions, check_cpu);
  const CodePages key_codes = pages_of("key_pages", key_pages, "key_scales", key_scales);
  const CodePages value_codes = pages_of("value_pages", value_pages, "value_scales", value_scales);
  check_dtype("value_pages", value_pages, key_pages.scalar_type());
  const NewTokens keys = tokens_of("key", key);
  const NewTokens values = tokens_of("value", value);
  const int64_t block_size = key_pages.size(2);
  check_places(block_table, positions, key_pages.size(0), block_size);
  if (positions.numel() == 0) return;
  std::vector<SlotToken> memory;
  const std::vector<BlockWrite> writes = make_writes(block_table, positions, block_size, &memory);
  check_distinct(writes);

  const int64_t heads = key.size(1);
  const auto quantise = WINNOW_SIMD(quantise_block);
  const int64_t numbers = std::min(block_size, key.size(2)) * (keys.dim + values.dim);
  parallel_for(0, static_cast<int64_t>(writes.size()) * heads,
               1 + kGrainNumbers / std::max<int64_t>(1, numbers), [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const BlockWrite& write = writes[static_cast<size_t>(i / heads)];
                   quantise(key_codes, keys, write, i % heads);
                   quantise(value_codes, values, write, i % heads);
                 }
               });
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("paged_quantise_", TORCH_BOX(&winnow::paged_quantise_));
}
