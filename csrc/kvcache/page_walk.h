// Which keys a task meets, in which order, and what is fetched ahead of them. Included by *_simd.cc
// only, inside which every instruction set has a copy of its own.
#pragma once

#include <cstdint>

#include "kvcache/paged_attention_simd.h"

namespace winnow::CPU_CAPABILITY {
namespace {

constexpr int64_t kKeys = 64;  // keys of a tile

inline int64_t round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}
inline int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
inline int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// The key positions that a query position sees: [low, high) and [0, sinks).
struct Span {
  int64_t low;
  int64_t high;
  int64_t sinks;

  bool misses(int64_t position, int64_t keys) const {
    return position >= sinks && (position >= high || position + keys <= low);
  }
  bool covers(int64_t position, int64_t keys) const {
    return (position >= low && position + keys <= high) || position + keys <= sinks;
  }
  bool has(int64_t position) const {
    return (position >= low && position < high) || position < sinks;
  }
};

inline Span span_of(const PagedAttention& call, int64_t length, int64_t row) {
  const int64_t i = length - call.queries + row / call.group;
  const int64_t causal_end = call.causal ? larger(0, i + 1) : length;
  Span span{0, causal_end, 0};
  if (call.window > 0) {
    span.low = larger(0, i - call.window + 1);
    if (!call.causal) span.high = larger(0, smaller(length, i + call.window));
    span.sinks = smaller(call.sinks, causal_end);
  }
  return span;
}

struct Tile {
  int64_t position;  // of the first key
  int64_t keys;
  int64_t block;
  int64_t slot;
};

// The tiles of a task in ascending order, without those that none of its rows sees.
struct Walk {
  const int32_t* table;
  const int32_t* list;
  int64_t block_size;
  int64_t length;
  Span span;
  int64_t entry;
  int64_t end;
  int64_t slot;

  Walk() = default;
  Walk(const PagedAttention& c, const PagedAttentionTask& task)
      : table(c.block_table + task.batch * c.table_stride),
        list(c.block_indices ? c.block_indices + task.batch * c.indices_stride[0] +
                                   task.key_head * c.indices_stride[1]
                             : nullptr),
        block_size(c.block_size),
        length(c.seq_lens[task.batch]),
        span(span_of(c, length, task.first_row)),
        entry(task.begin),
        end(task.end),
        slot(0) {
    const Span last = span_of(c, length, task.first_row + task.rows - 1);
    span.high = last.high;
    span.sinks = last.sinks;
  }

  bool next(Tile* tile) {
    for (; entry < end; ++entry, slot = 0) {
      const int64_t logical = list ? list[entry] : entry;
      if (logical < 0) continue;
      const int64_t start = logical * block_size;
      const int64_t stop = smaller(block_size, length - start);
      while (slot < stop) {
        const int64_t keys = smaller(kKeys, stop - slot);
        *tile = {start + slot, keys, table[logical], slot};
        slot += keys;
        if (!span.misses(tile->position, keys)) return true;
      }
    }
    return false;
  }
};

template <typename T>
inline const T* key_row(const PagedAttention& call, const Tile& tile, int64_t head) {
  return static_cast<const T*>(call.key_pages) + tile.block * call.key_stride[0] +
         head * call.key_stride[1] + tile.slot * call.key_stride[2];
}

template <typename T>
inline const T* value_row(const PagedAttention& call, const Tile& tile, int64_t head) {
  return static_cast<const T*>(call.value_pages) + tile.block * call.value_stride[0] +
         head * call.value_stride[1] + tile.slot * call.value_stride[2];
}

// The rows of a tile to come, fetched bit by bit while the present one is computed: into the L2
// cache, because the keys and values of two tiles exceed the L1. In the order of their addresses,
// which the processor's own prefetcher takes up (any other order was half as fast), and only where
// the rows lie one after the other.
struct Ahead {
  const char* next = nullptr;
  const char* end = nullptr;

  void fetch(int64_t bytes) {
    if (next >= end) return;
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(next + line, 0, 1);
    next += bytes;
  }
};

template <typename T>
inline Ahead ahead_of(const T* first, int64_t dim, int64_t stride, int64_t rows) {
  const auto* next = reinterpret_cast<const char*>(first);
  const int64_t bytes = rows * dim * static_cast<int64_t>(sizeof(T));
  return {next, stride == dim ? next + bytes : next};
}

}  // namespace
}  // namespace winnow::CPU_CAPABILITY
