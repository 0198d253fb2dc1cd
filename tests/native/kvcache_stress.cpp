// Random operations on tables that share a pool, checked against a model; compiled with sanitizers
// and run by test_kvcache_stress.py.
//
//   kvcache_stress fuzz OPERATIONS SEED     one thread: every effect and every refusal is
//   predicted,
//                                           and allocations fail at any point of some operations
//   kvcache_stress threads OPERATIONS SEED  four threads, caches of their own, one pool
//
// A page here is a few integers, and what a token stores is a hash of the tokens up to its own, as
// in a causal model. The model of a row is what each layer must read back; who owns a block is
// counted in the tables themselves.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "kvcache/block_pool.h"
#include "kvcache/cache_table.h"

using winnow::BlockPool;
using winnow::BlockPoolExhausted;
using winnow::CacheTable;
using Integers = CacheTable::Integers;

// Allocations that still succeed; the one after them throws, once.
static thread_local int64_t allowance = std::numeric_limits<int64_t>::max();

[[gnu::noinline]] void* operator new(size_t bytes) {
  if (allowance-- == 0) {
    allowance = std::numeric_limits<int64_t>::max();
    throw std::bad_alloc();
  }
  if (void* memory = std::malloc(bytes ? bytes : 1)) return memory;
  std::abort();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept {
  std::free(memory);
}

namespace {

constexpr int64_t kLayers = 2;
constexpr int64_t kBlock = 4;
constexpr int64_t kMostBlocks = 40;
constexpr int64_t kMostTokens = 28;  // of a row
constexpr size_t kMostCaches = 4;

#define REQUIRE(condition) \
  if (!(condition)) fail(__LINE__, #condition)

[[noreturn]] void fail(int line, const char* condition) {
  std::fprintf(stderr, "line %d: not so: %s\n", line, condition);
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

class World {
 public:
  World(Pages& pages, uint64_t seed, bool alone) : pages_(pages), dice_(seed), alone_(alone) {}

  void step() {
    const int64_t kind = roll(0, 99);
    if (caches_.empty() || (kind < 6 && caches_.size() < kMostCaches)) return create();
    Cache& cache = caches_[static_cast<size_t>(roll(0, static_cast<int64_t>(caches_.size()) - 1))];
    if (kind < 40) {
      append(cache);
    } else if (kind < 52) {
      write(cache);
    } else if (kind < 60) {
      if (caches_.size() < kMostCaches) fork(cache);
    } else if (kind < 68) {
      permute(cache);
    } else if (kind < 76) {
      truncate(cache);
    } else if (kind < 82) {
      free(cache);
    } else if (kind < 88) {
      register_prefix(cache);
    } else if (kind < 94) {
      match_prefix(cache);
    } else if (kind < 96) {
      drop(cache);
    } else if (kind < 98) {
      count(cache);
    } else {
      refuse(cache);
    }
    if (alone_) check_owners();
  }

  void check() {
    for (const Cache& cache : caches_) check(cache);
  }

 private:
  int64_t roll(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(dice_() % static_cast<uint64_t>(high - low + 1));
  }
  int64_t any_row(const Cache& cache) {
    return roll(0, static_cast<int64_t>(cache.rows.size()) - 1);
  }

  Snapshot snapshot() const {
    Snapshot now;
    const BlockPool& pool = *pages_.pool;
    for (int64_t b = 0; b < pool.num_blocks(); ++b) now.owners.push_back(pool.owners(b));
    now.free = pool.num_free();
    for (const auto& [use, block] : pool.prefixes().by_use()) now.prefixes.push_back(block);
    for (const Cache& cache : caches_) {
      now.tables.push_back(cache.blocks);
      now.tables.push_back(cache.lengths);
    }
    return now;
  }

  // Runs an operation; now and then its allocations fail one after the other before it succeeds.
  template <typename Operation>
  void attempt(const Operation& operation) {
    if (alone_ && roll(0, 15) == 0) {
      const Snapshot before = snapshot();
      for (int64_t successes = 0;; ++successes) {
        try {
          allowance = successes;
          operation();
          allowance = std::numeric_limits<int64_t>::max();
          return;
        } catch (const std::bad_alloc&) {
          REQUIRE(snapshot() == before);
        } catch (...) {
          allowance = std::numeric_limits<int64_t>::max();
          throw;
        }
      }
    }
    operation();
  }

  template <typename Operation>
  void refused(const Operation& operation) {
    const Snapshot before = alone_ ? snapshot() : Snapshot();
    try {
      attempt(operation);
    } catch (const std::invalid_argument&) {
      REQUIRE(!alone_ || snapshot() == before);
      return;
    }
    REQUIRE(!"refused");
  }

  // Blocks that an operation on (row, index) pairs needs, and whether the pool has them.
  bool enough(const Cache& cache, const std::vector<std::pair<size_t, int64_t>>& touched) const {
    const BlockPool& pool = *pages_.pool;
    std::vector<int32_t> rows(static_cast<size_t>(pool.num_blocks()));
    int64_t available = pool.num_free();
    for (int64_t b = 0; b < pool.num_blocks(); ++b) {
      rows[static_cast<size_t>(b)] = pool.owners(b) - pool.prefixes().has(static_cast<int32_t>(b));
      available += rows[static_cast<size_t>(b)] == 0 && pool.owners(b) == 1;
    }
    int64_t needed = 0;
    auto distinct = touched;
    std::sort(distinct.begin(), distinct.end());
    distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
    for (const auto& [row, index] : distinct) {
      if (index >= cache.held(row)) {
        ++needed;
      } else if (int32_t& sharers = rows[static_cast<size_t>(cache.block(row, index))];
                 sharers > 1) {
        ++needed;
        --sharers;
      }
    }
    return needed <= available;
  }

  // An append or a write, up to the moment where its tokens are in the pages.
  template <typename Operation, typename Store>
  void change(Cache& cache, const std::vector<std::pair<size_t, int64_t>>& touched,
              const Operation& operation, const Store& store) {
    const std::lock_guard<std::mutex> writing(pages_.writing);
    const bool possible = !alone_ || enough(cache, touched);
    const Snapshot before = alone_ && !possible ? snapshot() : Snapshot();
    try {
      attempt(operation);
    } catch (const BlockPoolExhausted& error) {
      REQUIRE(error.needed > error.free);
      REQUIRE(!alone_ || (!possible && snapshot() == before));
      return;
    }
    REQUIRE(possible);
    cache.follow();
    for (const CacheTable::Copy& copy : cache.table->copies()) {
      for (int64_t layer = 0; layer < kLayers; ++layer) {
        for (int64_t slot = 0; slot < kBlock; ++slot) {
          pages_.at(layer, copy.target, slot) = pages_.at(layer, copy.source, slot);
        }
      }
    }
    store();
  }

  void create() {
    Cache cache;
    const int64_t rows = roll(0, 3);
    attempt(
        [&] { cache.table = std::make_unique<CacheTable>(pages_.pool, rows, kLayers, kBlock); });
    cache.rows.resize(static_cast<size_t>(rows));
    adopt(std::move(cache));
  }

  void adopt(Cache cache) {
    cache.attach();
    check(cache);
    caches_.push_back(std::move(cache));
  }

  void append(Cache& cache) {
    const int64_t layer = roll(0, kLayers - 1);
    const int64_t tokens = roll(0, 6);
    const bool whole = roll(0, 1) == 0;
    Integers lengths(cache.rows.size(), tokens);
    std::vector<std::pair<size_t, int64_t>> touched;
    bool room = true;
    for (size_t r = 0; r < lengths.size(); ++r) {
      if (!whole) lengths[r] = roll(0, tokens);
      const int64_t start = static_cast<int64_t>(cache.rows[r].stored[layer].size());
      room = room && start + lengths[r] <= kMostTokens;
      for (int64_t p = start; p < start + lengths[r]; ++p) touched.push_back({r, p / kBlock});
    }
    if (!room) return;
    std::vector<int64_t> positions(lengths.size() * static_cast<size_t>(tokens) + 1);
    const auto operation = [&] {
      cache.table->append(layer, tokens, whole ? nullptr : &lengths, positions.data());
    };
    change(cache, touched, operation, [&] {
      for (size_t r = 0; r < lengths.size(); ++r) {
        Row& row = cache.rows[r];
        std::vector<uint64_t>& stored = row.stored[layer];
        for (int64_t t = 0; t < tokens; ++t) {
          const int64_t position = positions[r * static_cast<size_t>(tokens) + t];
          if (t >= lengths[r]) {
            REQUIRE(position == -1);
            continue;
          }
          REQUIRE(position == static_cast<int64_t>(stored.size()));
          if (stored.size() == row.tokens.size()) row.tokens.push_back(roll(0, 1));
          stored.push_back(row.hash(layer, stored.size()));
          pages_.at(layer, cache.block(r, position / kBlock), position % kBlock) = stored.back();
        }
        row.freed = row.freed && lengths[r] == 0;
      }
    });
    check(cache);
  }

  void write(Cache& cache) {
    const int64_t layer = roll(0, kLayers - 1);
    const int64_t tokens = roll(0, 4);
    std::vector<std::pair<size_t, int64_t>> touched;
    std::vector<int64_t> positions;
    for (size_t r = 0; r < cache.rows.size(); ++r) {
      const int64_t length = static_cast<int64_t>(cache.rows[r].stored[layer].size());
      if (length == 0) return;
      for (int64_t t = 0; t < tokens; ++t) {
        positions.push_back(roll(0, length - 1));
        touched.push_back({r, positions.back() / kBlock});
      }
    }
    const auto operation = [&] { cache.table->write(layer, tokens, positions.data()); };
    change(cache, touched, operation, [&] {
      for (size_t i = 0; i < positions.size(); ++i) {
        const size_t r = i / static_cast<size_t>(tokens);
        const size_t position = static_cast<size_t>(positions[i]);
        Row& row = cache.rows[r];
        row.overwritten = std::min(row.overwritten, position);
        row.stored[layer][position] = dice_();
        pages_.at(layer, cache.block(r, positions[i] / kBlock), positions[i] % kBlock) =
            row.stored[layer][position];
      }
    });
    check(cache);
  }

  void fork(Cache& cache) {
    if (cache.rows.empty()) return;
    Integers parents;
    for (int64_t i = roll(0, 4); i > 0; --i) parents.push_back(any_row(cache));
    Cache child;
    attempt([&] { child.table = cache.table->fork(parents); });
    for (const int64_t parent : parents) {
      child.rows.push_back(cache.rows[static_cast<size_t>(parent)]);
    }
    adopt(std::move(child));
  }

  void permute(Cache& cache) {
    Integers ancestors;
    for (size_t r = 0; r < cache.rows.size(); ++r) ancestors.push_back(any_row(cache));
    attempt([&] { cache.table->permute(ancestors); });
    cache.follow();
    std::vector<Row> rows;
    for (const int64_t ancestor : ancestors) {
      rows.push_back(cache.rows[static_cast<size_t>(ancestor)]);
    }
    cache.rows = std::move(rows);
    check(cache);
  }

  void truncate(Cache& cache) {
    Integers lengths;
    for (const Row& row : cache.rows) lengths.push_back(roll(0, row.length()));
    attempt([&] { cache.table->truncate(lengths); });
    for (size_t r = 0; r < lengths.size(); ++r) {
      cache.rows[r].cut(static_cast<size_t>(lengths[r]));
    }
    check(cache);
  }

  void free(Cache& cache) {
    Integers rows;
    bool again = false;
    for (size_t r = 0; r < cache.rows.size(); ++r) {
      if (roll(0, 1) == 0) continue;
      rows.push_back(static_cast<int64_t>(r));
      again = again || cache.rows[r].freed;
    }
    if (again) return refused([&] { cache.table->free(rows); });
    attempt([&] { cache.table->free(rows); });
    for (const int64_t r : rows) {
      cache.rows[static_cast<size_t>(r)] = Row();
      cache.rows[static_cast<size_t>(r)].freed = true;
    }
    check(cache);
  }

  void register_prefix(Cache& cache) {
    if (cache.rows.empty()) return;
    const int64_t r = any_row(cache);
    const Row& row = cache.rows[static_cast<size_t>(r)];
    const size_t known = std::min({row.stored[0].size(), row.stored[1].size(), row.overwritten});
    const int64_t count = roll(0, static_cast<int64_t>(known));
    const Integers tokens(row.tokens.begin(), row.tokens.begin() + count);
    int64_t found = 0;
    attempt([&] { found = cache.table->register_prefix(r, tokens); });
    REQUIRE(found == count / kBlock * kBlock);
    if (!alone_) return;
    CacheTable other(pages_.pool, 1, kLayers, kBlock);
    REQUIRE(other.match_prefix(0, tokens) == found);
  }

  void match_prefix(Cache& cache) {
    if (cache.rows.empty()) return;
    const int64_t r = any_row(cache);
    Row& row = cache.rows[static_cast<size_t>(r)];
    Integers tokens;
    for (int64_t i = roll(0, 16); i > 0; --i) tokens.push_back(roll(0, 1));
    if (row.length() > 0) return refused([&] { cache.table->match_prefix(r, tokens); });
    int64_t found = 0;
    attempt([&] { found = cache.table->match_prefix(r, tokens); });
    cache.follow();
    if (found > 0) {
      tokens.resize(static_cast<size_t>(found));
      row = Row();
      row.tokens = tokens;
      for (int64_t layer = 0; layer < kLayers; ++layer) {
        for (size_t p = 0; p < tokens.size(); ++p) row.stored[layer].push_back(row.hash(layer, p));
      }
    }
    check(cache);
  }

  void drop(Cache& cache) {
    std::swap(cache, caches_.back());
    caches_.pop_back();
    if (alone_ && pages_.pool->num_blocks() < kMostBlocks && roll(0, 99) == 0) {
      attempt([&] { pages_.pool->grow(pages_.pool->num_blocks() + 1); });
    }
  }

  // What rows retain and what freeing them returns, one block at a time.
  void count(Cache& cache) {
    Integers kept;
    std::vector<bool> held(kMostBlocks, false);
    int64_t distinct = 0;
    for (size_t r = 0; r < cache.rows.size(); ++r) {
      if (roll(0, 1) == 0) continue;
      kept.push_back(static_cast<int64_t>(r));
      for (int64_t i = 0; i < cache.held(r); ++i) {
        const size_t block = static_cast<size_t>(cache.block(r, i));
        distinct += !held[block];
        held[block] = true;
      }
    }
    attempt([&] { REQUIRE(cache.table->retained(kept) == distinct); });
    const Integers added = cache.table->marginal(&kept);
    const Integers returned = cache.table->marginal(nullptr);
    for (size_t r = 0; r < cache.rows.size(); ++r) {
      int64_t more = 0;
      int64_t own = 0;
      for (int64_t i = 0; i < cache.held(r); ++i) {
        const int32_t block = cache.block(r, i);
        more += !held[static_cast<size_t>(block)];
        if (!alone_) continue;
        own += pages_.pool->owners(block) - pages_.pool->prefixes().has(block) == 1;
      }
      REQUIRE(added[r] == more);
      REQUIRE(!alone_ || returned[r] == own);
    }
  }

  void refuse(Cache& cache) {
    const int64_t rows = static_cast<int64_t>(cache.rows.size());
    std::vector<int64_t> positions(cache.rows.size() + 1, kMostTokens + 1);
    CacheTable& table = *cache.table;
    switch (roll(0, 6)) {
      case 0:
        return refused([&] { table.append(kLayers, 1, nullptr, positions.data()); });
      case 1: {
        // The last row's length is wrong: what was found out about the others is undone.
        Integers lengths(cache.rows.size(), 1);
        if (rows > 0) lengths.back() = 2;
        if (rows == 0) lengths.push_back(1);
        return refused([&] { table.append(0, 1, &lengths, positions.data()); });
      }
      case 2:
        if (rows > 0) refused([&] { table.write(0, 1, positions.data()); });
        return;
      case 3:
        return refused([&] { table.fork({rows}); });
      case 4:
        return refused([&] { table.permute(Integers(cache.rows.size() + 1, 0)); });
      case 5:
        return refused([&] { table.truncate(Integers(cache.rows.size() + 1, 0)); });
      default:
        return refused([&] { table.register_prefix(0, Integers(kMostTokens + 1, 0)); });
    }
  }

  // The mirror and the pages against the model.
  void check(const Cache& cache) {
    for (size_t r = 0; r < cache.rows.size(); ++r) {
      const Row& row = cache.rows[r];
      REQUIRE(cache.lengths[r] == row.length());
      for (int64_t i = 0; i < cache.capacity; ++i) {
        REQUIRE((cache.block(r, i) >= 0) == (i < cache.held(r)));
      }
      for (int64_t layer = 0; layer < kLayers; ++layer) {
        for (size_t p = 0; p < row.stored[layer].size(); ++p) {
          const int64_t position = static_cast<int64_t>(p);
          REQUIRE(pages_.at(layer, cache.block(r, position / kBlock), position % kBlock) ==
                  row.stored[layer][p]);
        }
      }
    }
  }

  void check_owners() const {
    const BlockPool& pool = *pages_.pool;
    std::vector<int32_t> owners(static_cast<size_t>(pool.num_blocks()));
    for (const Cache& cache : caches_) {
      for (size_t r = 0; r < cache.rows.size(); ++r) {
        for (int64_t i = 0; i < cache.held(r); ++i) {
          ++owners[static_cast<size_t>(cache.block(r, i))];
        }
      }
    }
    int64_t free = 0;
    int64_t evictable = 0;
    for (size_t b = 0; b < owners.size(); ++b) {
      const bool registered = pool.prefixes().has(static_cast<int32_t>(b));
      REQUIRE(pool.owners(static_cast<int64_t>(b)) == owners[b] + registered);
      free += owners[b] == 0 && !registered;
      evictable += owners[b] == 0 && registered;
    }
    REQUIRE(pool.num_free() == free);
    REQUIRE(pool.num_evictable() == evictable);
  }

  Pages& pages_;
  std::mt19937_64 dice_;
  const bool alone_;
  std::vector<Cache> caches_;
};

// Nothing is owned any more, but for what the prefix index holds; its blocks can all be had.
void check_returned(Pages& pages) {
  BlockPool& pool = *pages.pool;
  const int64_t all = pool.num_blocks();
  REQUIRE(pool.num_free() + pool.num_evictable() == all);
  pool.require(all);
  REQUIRE(pool.num_free() == all && pool.prefixes().by_use().empty());
}

void fuzz(int64_t operations, uint64_t seed) {
  Pages pages(24);
  {
    World world(pages, seed, true);
    for (int64_t i = 0; i < operations; ++i) {
      world.step();
      if (i % 64 == 0) world.check();  // what an operation on one cache did to the others
    }
  }
  check_returned(pages);
}

void stress(int64_t operations, uint64_t seed) {
  constexpr uint64_t kThreads = 4;
  Pages pages(kMostBlocks);
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      World world(pages, seed * kThreads + t, false);
      for (int64_t i = 0; i < operations; ++i) {
        world.step();
        if (i % 16 == 0) world.check();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  check_returned(pages);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const int64_t operations = std::stoll(argv[2]);
  const uint64_t seed = std::stoull(argv[3]);
  if (std::string(argv[1]) == "fuzz") fuzz(operations, seed);
  if (std::string(argv[1]) == "threads") stress(operations, seed);
  std::printf("%s: %lld operations\n", argv[1], static_cast<long long>(operations));
  return 0;
}
