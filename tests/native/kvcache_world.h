// Operations on tables that share a pool, one at a time, each checked against the model: every
// effect and every refusal is predicted. What happens next is somebody else's choice: dice
// (kvcache_stress.cpp) or a fuzzer's bytes (kvcache_fuzz.cpp).
#pragma once

#include <new>
#include <stdexcept>
#include <utility>
#include <vector>

#include "kvcache_model.h"

namespace winnow::model {

class Choices {
 public:
  virtual ~Choices() = default;
  virtual int64_t roll(int64_t low, int64_t high) = 0;  // both included
};

// Allocations that still succeed in this thread; the one after them throws, once.
extern thread_local int64_t allowance;
constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();

class World {
 public:
  // `alone`: no other thread uses the pool, so that its counts can be predicted too, and
  // allocations fail at any point of some operations.
  World(Pages& pages, Choices& choices, bool alone)
      : pages_(pages), choices_(choices), alone_(alone) {}

  void step();
  void check() const;

 private:
  // What an append or a write touches: (row, index of the block).
  using Touched = std::vector<std::pair<size_t, int64_t>>;

  int64_t roll(int64_t low, int64_t high) { return choices_.roll(low, high); }
  int64_t any_row(const Cache& cache) {
    return roll(0, static_cast<int64_t>(cache.rows.size()) - 1);
  }
  // No index below `count`: negative, just too large, or so large that sums overflow.
  int64_t outside(int64_t count);
  // `values`, one of them replaced by what is no index below `count`.
  Integers spoiled(Integers values, int64_t count);

  void create();
  void adopt(Cache cache);
  void append(Cache& cache);
  void write(Cache& cache);
  void fork(Cache& cache);
  void permute(Cache& cache);
  void truncate(Cache& cache);
  void free(Cache& cache);
  void register_prefix(Cache& cache);
  void match_prefix(Cache& cache);
  void drop(Cache& cache);
  void count(Cache& cache);
  void refuse_by_table(Cache& cache);
  void refuse_by_pool();

  Snapshot snapshot() const;
  bool enough(const Cache& cache, const Touched& touched) const;
  void check(const Cache& cache) const;
  void check_owners() const;

  // Runs an operation; now and then its allocations fail one after the other before it succeeds.
  template <typename Operation>
  void attempt(const Operation& operation) {
    if (alone_ && roll(0, 15) == 0) {
      const Snapshot before = snapshot();
      for (int64_t successes = 0;; ++successes) {
        try {
          allowance = successes;
          operation();
          allowance = kUnlimited;
          return;
        } catch (const std::bad_alloc&) {
          REQUIRE(snapshot() == before);
        } catch (...) {
          allowance = kUnlimited;
          throw;
        }
      }
    }
    operation();
  }

  // Runs an operation that must throw and change nothing.
  template <typename Operation>
  void refused(const Operation& operation) {
    const Snapshot before = alone_ ? snapshot() : Snapshot();
    try {
      attempt(operation);
      REQUIRE(!"refused");
    } catch (const std::invalid_argument&) {
    } catch (const BlockPoolExhausted&) {
    }
    REQUIRE(!alone_ || snapshot() == before);
  }

  // An append or a write, up to the moment where its tokens are in the pages.
  template <typename Operation, typename Store>
  void change(Cache& cache, const Touched& touched, const Operation& operation,
              const Store& store) {
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

  Pages& pages_;
  Choices& choices_;
  const bool alone_;
  uint64_t overwrites_ = 0;
  std::vector<Cache> caches_;
};

// Nothing is owned any more, but for what the prefix index holds; its blocks can all be had.
void check_returned(Pages& pages);

}  // namespace winnow::model
