// Indices, counts and lengths that no table and no pool may follow.
#include <limits>

#include "kvcache_world.h"

namespace winnow::model {

constexpr int64_t kHuge = std::numeric_limits<int64_t>::max();

int64_t World::outside(int64_t count) {
  const int64_t indices[] = {-1,        count,      count + 1, -(1ll << 31), 1ll << 31,
                             1ll << 32, -kHuge - 1, kHuge / 4, kHuge - 1,    kHuge};
  return indices[roll(0, std::size(indices) - 1)];
}

Integers World::spoiled(Integers values, int64_t count) {
  if (values.empty()) values.push_back(0);
  values[static_cast<size_t>(roll(0, static_cast<int64_t>(values.size()) - 1))] = outside(count);
  return values;
}

void World::refuse_by_table(Cache& cache) {
  const size_t size = cache.rows.size();
  const int64_t rows = static_cast<int64_t>(size);
  const Integers zeros(size, 0);
  const Integers one_more(size + 1, 0);
  Integers positions(size + 1, 0);
  CacheTable& table = *cache.table;
  switch (roll(0, 15)) {
    case 0:
      return refused(
          [&, layer = outside(kLayers)] { table.append(layer, 1, nullptr, positions.data()); });
    case 1:
      // Some row's length is wrong: what was found out about the rows before it is undone.
      return refused([&, lengths = spoiled(Integers(size, 1), 2)] {
        table.append(0, 1, &lengths, positions.data());
      });
    case 2:
      return refused([&] { table.append(0, 1, &one_more, positions.data()); });
    case 3: {
      // More tokens than any row can count, or than the pool has room for.
      if (rows == 0) return;
      const int64_t tokens = outside(kMostBlocks * kBlock + 1);
      return refused([&] { table.append(0, tokens, nullptr, nullptr); });
    }
    case 4:
      return refused([&, layer = outside(kLayers)] { table.write(layer, 1, positions.data()); });
    case 5: {
      if (rows == 0) return;
      const size_t r = static_cast<size_t>(any_row(cache));
      for (size_t i = 0; i < r; ++i) positions[i] = std::max<int64_t>(0, cache.lengths[i] - 1);
      positions[r] = outside(cache.lengths[r]);
      return refused([&] { table.write(0, 1, positions.data()); });
    }
    case 6:
      return refused([&, parents = spoiled(zeros, rows)] { table.fork(parents); });
    case 7:
      return refused([&] { table.permute(one_more); });
    case 8:
      return refused([&, ancestors = spoiled(zeros, rows)] { table.permute(ancestors); });
    case 9:
      return refused([&] { table.truncate(one_more); });
    case 10: {
      if (rows == 0) return;
      const size_t r = static_cast<size_t>(any_row(cache));
      Integers lengths = zeros;
      lengths[r] = outside(cache.lengths[r] + 1);
      return refused([&] { table.truncate(lengths); });
    }
    case 11:
      return refused([&, freed = Integers{outside(rows)}] { table.free(freed); });
    case 12: {
      const bool match = roll(0, 1) == 0;
      return refused([&, row = outside(rows)] {
        match ? table.match_prefix(row, zeros) : table.register_prefix(row, zeros);
      });
    }
    case 13:
      if (rows == 0) return;
      return refused(
          [&, tokens = Integers(kMostTokens + 1, 0)] { table.register_prefix(0, tokens); });
    case 14:
      return refused([&, kept = spoiled(zeros, rows)] { table.retained(kept); });
    default:
      return refused([&, kept = spoiled(zeros, rows)] { table.marginal(&kept); });
  }
}

void World::refuse_by_pool() {
  BlockPool& pool = *pages_.pool;
  const auto locked = [&](const auto& operation) {
    refused([&] {
      const auto lock = pool.lock();
      operation();
    });
  };
  // A pool only grows: by now another thread may have taken what is free, never what is not there.
  const int64_t block = outside(kMostBlocks);
  switch (roll(0, 2)) {
    case 0:
      return locked([&] { pool.owners(block); });
    case 1:
      if (block < 0 || block >= 1ll << 31) locked([&] { pool.grow(block); });
      return;
    default:
      return refused(
          [&, rows = -1 - roll(0, 9)] { CacheTable(pages_.pool, rows, kLayers, kBlock); });
  }
}

}  // namespace winnow::model
