// What the loops of this family are told: raw pointers, strides and the pattern.
#pragma once

#include <cstdint>

#include "attention/pattern.h"
#include "common/element_type.h"

namespace winnow {

// (batch, heads, rows, dim) with a contiguous last dimension; strides in elements.
struct Source {
  const void* data = nullptr;
  int64_t batch = 0;
  int64_t head = 0;
  int64_t row = 0;
};

namespace {

template <typename T>
inline const T* head_rows(const Source& source, int64_t batch, int64_t head) {
  return static_cast<const T*>(source.data) + batch * source.batch + head * source.head;
}

}  // namespace

struct AttentionProblem {
  ElementType type = ElementType::kFloat;
  int64_t batch = 0;
  int64_t query_heads = 0;
  int64_t kv_heads = 0;
  int64_t dim = 0;
  double scale = 1.0;
  Pattern pattern;
  Source query, key, value, slot_key, slot_value;
};

// A tile is this many query rows by at most that many keys: the packed operands of a tile fit the
// second-level cache at D = 256 and the scores the first level. Chunks of up to 80 rows are one
// tile of keys.
constexpr int64_t kTile = 64;
constexpr int64_t kKeyTile = 80;

constexpr int64_t padded_dim(int64_t dim) {
  return (dim + 15) / 16 * 16;
}

}  // namespace winnow
