// Who owns which block of a pool of pages: reference counts and a free list. Plain C++ without
// torch; Python calls it under the interpreter lock, which is the lock of this bookkeeping too.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

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

  int64_t num_blocks() const { return static_cast<int64_t>(owners_.size()); }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }

  // More blocks, all of them free; those that are there keep their numbers.
  void grow(int64_t num_blocks);

  // Throws BlockPoolExhausted unless `blocks` can be allocated.
  void require(int64_t blocks) const;

  // A block with one owner.
  int32_t allocate();
  // One owner more of a block that has at least one.
  void retain(int32_t block);
  // One owner less; the last one returns the block to the free list.
  void release(int32_t block);
  // 0 for a free block.
  int32_t owners(int64_t block) const;

 private:
  void check_owned(int64_t block, const char* action) const;

  std::vector<int32_t> owners_;
  std::vector<int32_t> free_;  // used from the back: a block just returned is still in the cache
};

}  // namespace winnow
