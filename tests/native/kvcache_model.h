// What tables that share a pool must hold, in plain vectors, and the tables themselves. A page here
// is a few integers, and what a token stores is a hash of the tokens up to its own, as in a causal
// model. The model of a row is what each layer must read back; who owns a block is counted in the
// tables.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "kvcache/block_pool.h"
#include "kvcache/cache_table.h"

namespace winnow::model {

using Integers = CacheTable::Integers;

constexpr int64_t kLayers = 2;
constexpr int64_t kBlock = 4;
constexpr int64_t kMostBlocks = 40;
constexpr int64_t kMostTokens = 28;  // of a row
constexpr size_t kMostCaches = 4;

#define REQUIRE(condition) \
  if (!(condition)) ::winnow::model::fail(__FILE__, __LINE__, #condition)

[[noreturn]] inline void fail(const char* file, int line, const char* condition) {
  std::fprintf(stderr, "%s:%d: not so: %s\n", file, line, condition);
  std::abort();
}

struct Pages {
  explicit Pages(int64_t blocks) : pool(std::make_shared<BlockPool>(blocks)) {}

  uint64_t& at(int64_t layer, int64_t block, int64_t slot) {
    return slots[layer][block * kBlock + slot];
  }

  std::shared_ptr<BlockPool> pool;
  std::mutex writing;  // held from an append's bookkeeping until its tokens are stored
  std::vector<uint64_t> slots[kLayers] = {std::vector<uint64_t>(kMostBlocks * kBlock),
                                          std::vector<uint64_t>(kMostBlocks * kBlock)};
};

// What a row must hold.
struct Row {
  std::vector<int64_t> tokens;
  std::vector<uint64_t> stored[kLayers];
  size_t overwritten = std::numeric_limits<size_t>::max();  // the first such position
  bool freed = false;

  int64_t length() const {
    return static_cast<int64_t>(std::max(stored[0].size(), stored[1].size()));
  }
  void cut(size_t length) {
    for (auto& layer : stored) layer.resize(std::min(layer.size(), length));
    tokens.resize(length);
    if (length <= overwritten) overwritten = std::numeric_limits<size_t>::max();
  }
  // What position `at` of a layer holds, unless it is overwritten.
  uint64_t hash(int64_t layer, size_t at) const {
    uint64_t value = static_cast<uint64_t>(layer);
    for (size_t i = 0; i <= at; ++i) {
      value = (value + static_cast<uint64_t>(tokens[i]) + 1) * 0x9E3779B97F4A7C15ull;
      value ^= value >> 29;
    }
    return value;
  }
};

struct Cache {
  std::unique_ptr<CacheTable> table;
  std::vector<Row> rows;
  std::vector<int32_t> blocks;  // the mirror, as wide as the longest row needs or wider
  std::vector<int32_t> lengths;
  int64_t capacity = 0;

  void attach() {
    lengths.resize(rows.size());
    capacity = std::max(table->width(), 2 * capacity);
    blocks.assign(rows.size() * static_cast<size_t>(capacity), 7777);
    table->attach(blocks.data(), capacity, lengths.data());
  }
  void follow() {
    if (table->width() > capacity) attach();
  }
  int32_t block(size_t row, int64_t index) const {
    return blocks[row * static_cast<size_t>(capacity) + static_cast<size_t>(index)];
  }
  int64_t held(size_t row) const { return (rows[row].length() + kBlock - 1) / kBlock; }
};

// All that an operation which throws must leave as it was.
struct Snapshot {
  std::vector<int32_t> owners;
  int64_t free;
  std::vector<int32_t> prefixes;  // by use
  std::vector<std::vector<int32_t>> tables;

  bool operator==(const Snapshot& other) const {
    return owners == other.owners && free == other.free && prefixes == other.prefixes &&
           tables == other.tables;
  }
};

}  // namespace winnow::model
