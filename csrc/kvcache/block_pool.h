// Who owns which block of a pool of pages: reference counts and a free list. Plain C++ without
// torch. Everything here is called with lock() held, by tables on the pool and by the bindings.
// What throws, for want of memory too, has changed nothing.
#pragma once

#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "kvcache/prefix_index.h"

namespace winnow {

class BlockPoolExhausted : public std::runtime_error {
 public:
  BlockPoolExhausted(int64_t needed, int64_t free, int64_t total);

  const int64_t needed;
  const int64_t free;
  const int64_t total;
};

class BlockPool {
 public:
  explicit BlockPool(int64_t num_blocks);

  // One lock for a pool, its prefixes and every table on it. Nothing under it calls Python, so a
  // thread may wait for it with the interpreter lock or without.
  std::unique_lock<std::mutex> lock() { return std::unique_lock<std::mutex>(mutex_); }

  int64_t num_blocks() const { return static_cast<int64_t>(owners_.size()); }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }

  // More blocks, all of them free; those that are there keep their numbers.
  void grow(int64_t num_blocks);

  // Blocks that only the prefix index holds: given up as soon as they are needed.
  int64_t num_evictable() const;

  // Throws BlockPoolExhausted unless `blocks` can be allocated. Evicts the least recently used
  // prefixes where there are too few free ones; as many allocate() then cannot fail.
  void require(int64_t blocks);

  // A block with one owner.
  int32_t allocate();
  // One owner more of a block that has at least one.
  void retain(int32_t block);
  // One owner less; the last one returns the block to the free list.
  void release(int32_t block);
  // 0 for a free block.
  int32_t owners(int64_t block) const;

  // Prefixes: the index is one owner of each block that has a place in it.
  const PrefixIndex& prefixes() const { return prefixes_; }
  void add_prefix(int32_t block, int32_t parent, const int64_t* tokens, int64_t count);
  void use_prefix(const std::vector<int32_t>& chain) { prefixes_.touch(chain); }
  // Forgets the block's place, and with it the blocks that follow. Allocates nothing.
  void forget_prefix(int32_t block);

 private:
  void check_owned(int64_t block, const char* action) const;

  std::mutex mutex_;
  std::vector<int32_t> owners_;
  PrefixIndex prefixes_;
  std::vector<int32_t> free_;  // used from the back: a block just returned is still in the cache
};

}  // namespace winnow
