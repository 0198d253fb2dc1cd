#include "kvcache_world.h"

#include <algorithm>
#include <memory>

namespace winnow::model {

thread_local int64_t allowance = kUnlimited;

}  // namespace winnow::model

[[gnu::noinline]] void* operator new(size_t bytes) {
  int64_t& allowance = winnow::model::allowance;
  if (allowance-- == 0) {
    allowance = winnow::model::kUnlimited;
    throw std::bad_alloc();
  }
  if (void* memory = std::malloc(bytes ? bytes : 1)) return memory;
  std::abort();
}
[[gnu::noinline]] void* operator new(size_t bytes, const std::nothrow_t&) noexcept {  // libFuzzer's
  return std::malloc(bytes ? bytes : 1);
}
[[gnu::noinline]] void operator delete(void* memory) noexcept {
  std::free(memory);
}
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept {
  std::free(memory);
}

namespace winnow::model {

void World::step() {
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
  } else if (kind < 87) {
    register_prefix(cache);
  } else if (kind < 92) {
    match_prefix(cache);
  } else if (kind < 94) {
    drop(cache);
  } else if (kind < 96) {
    count(cache);
  } else if (kind < 99) {
    refuse_by_table(cache);
  } else {
    refuse_by_pool();
  }
  if (alone_) check_owners();
}

void World::check() const {
  for (const Cache& cache : caches_) check(cache);
}

Snapshot World::snapshot() const {
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

// Blocks that an operation on (row, index) pairs needs, and whether the pool has them.
bool World::enough(const Cache& cache, const Touched& touched) const {
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
    } else if (int32_t& sharers = rows[static_cast<size_t>(cache.block(row, index))]; sharers > 1) {
      ++needed;
      --sharers;
    }
  }
  return needed <= available;
}

void World::create() {
  Cache cache;
  const int64_t rows = roll(0, 3);
  attempt([&] { cache.table = std::make_unique<CacheTable>(pages_.pool, rows, kLayers, kBlock); });
  cache.rows.resize(static_cast<size_t>(rows));
  adopt(std::move(cache));
}

void World::adopt(Cache cache) {
  cache.attach();
  check(cache);
  caches_.push_back(std::move(cache));
}

void World::append(Cache& cache) {
  const int64_t layer = roll(0, kLayers - 1);
  const int64_t tokens = roll(0, 6);
  const bool whole = roll(0, 1) == 0;
  Integers lengths(cache.rows.size(), tokens);
  Touched touched;
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

void World::write(Cache& cache) {
  const int64_t layer = roll(0, kLayers - 1);
  const int64_t tokens = roll(0, 4);
  Touched touched;
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
      row.stored[layer][position] = ~++overwrites_;  // no hash of tokens
      pages_.at(layer, cache.block(r, positions[i] / kBlock), positions[i] % kBlock) =
          row.stored[layer][position];
    }
  });
  check(cache);
}

void World::fork(Cache& cache) {
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

void World::permute(Cache& cache) {
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

void World::truncate(Cache& cache) {
  Integers lengths;
  for (const Row& row : cache.rows) lengths.push_back(roll(0, row.length()));
  attempt([&] { cache.table->truncate(lengths); });
  for (size_t r = 0; r < lengths.size(); ++r) {
    cache.rows[r].cut(static_cast<size_t>(lengths[r]));
  }
  check(cache);
}

void World::free(Cache& cache) {
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

void World::register_prefix(Cache& cache) {
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

void World::match_prefix(Cache& cache) {
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

void World::drop(Cache& cache) {
  std::swap(cache, caches_.back());
  caches_.pop_back();
  if (alone_ && pages_.pool->num_blocks() < kMostBlocks && roll(0, 99) == 0) {
    attempt([&] { pages_.pool->grow(pages_.pool->num_blocks() + 1); });
  }
}

// What rows retain and what freeing them returns, one block at a time.
void World::count(Cache& cache) {
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

// The mirror and the pages against the model.
void World::check(const Cache& cache) const {
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

void World::check_owners() const {
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

// Nothing is owned any more, but for what the prefix index holds; its blocks can all be had.
void check_returned(Pages& pages) {
  BlockPool& pool = *pages.pool;
  const int64_t all = pool.num_blocks();
  REQUIRE(pool.num_free() + pool.num_evictable() == all);
  pool.require(all);
  REQUIRE(pool.num_free() == all && pool.prefixes().by_use().empty());
}

}  // namespace winnow::model
