#include "kvcache/block_pool.h"

#include <limits>
#include <string>

#include "common/fail.h"

namespace winnow {

BlockPoolExhausted::BlockPoolExhausted(int64_t needed, int64_t free, int64_t total)
    : std::runtime_error("the block pool is exhausted: " + std::to_string(needed) +
                         " blocks needed, " + std::to_string(free) + " free of " +
                         std::to_string(total) + "; nothing was changed"),
      needed(needed),
      free(free),
      total(total) {}

BlockPool::BlockPool(int64_t num_blocks) {
  grow(num_blocks);
}

void BlockPool::grow(int64_t num_blocks) {
  const int64_t before = this->num_blocks();
  if (num_blocks < before || num_blocks > std::numeric_limits<int32_t>::max()) {
    fail("num_blocks: expected ", before, " <= num_blocks < 2**31, got ", num_blocks);
  }
  std::vector<int32_t> free;
  free.reserve(static_cast<size_t>(num_blocks));  // release() never allocates, so it cannot fail
  for (int64_t block = num_blocks; block-- > before;) free.push_back(static_cast<int32_t>(block));
  free.insert(free.end(), free_.begin(), free_.end());
  owners_.resize(static_cast<size_t>(num_blocks), 0);
  free_.swap(free);
}

int64_t BlockPool::num_evictable() const {
  int64_t count = 0;
  for (const auto& [use, block] : prefixes_.by_use()) count += owners(block) == 1;
  return count;
}

void BlockPool::require(int64_t blocks) {
  std::vector<int32_t> evicted;
  for (const auto& [use, block] : prefixes_.by_use()) {
    if (blocks <= num_free() + static_cast<int64_t>(evicted.size())) break;
    if (owners(block) == 1) evicted.push_back(block);
  }
  const int64_t available = num_free() + static_cast<int64_t>(evicted.size());
  if (blocks > available) throw BlockPoolExhausted(blocks, available, num_blocks());
  for (const int32_t block : evicted) {
    if (prefixes_.has(block)) forget_prefix(block);  // else it went with what it followed
  }
}

void BlockPool::add_prefix(int32_t block, int32_t parent, const int64_t* tokens, int64_t count) {
  check_owned(block, "register");
  prefixes_.add(block, parent, tokens, count);
  retain(block);
}

void BlockPool::forget_prefix(int32_t block) {
  prefixes_.remove(block, [this](int32_t gone) { release(gone); });
}

int32_t BlockPool::allocate() {
  require(1);
  const int32_t block = free_.back();
  free_.pop_back();
  owners_[static_cast<size_t>(block)] = 1;
  return block;
}

void BlockPool::retain(int32_t block) {
  check_owned(block, "retain");
  ++owners_[static_cast<size_t>(block)];
}

void BlockPool::release(int32_t block) {
  check_owned(block, "release");
  if (--owners_[static_cast<size_t>(block)] == 0) free_.push_back(block);
}

int32_t BlockPool::owners(int64_t block) const {
  if (block < 0 || block >= num_blocks()) {
    fail("block: expected 0 <= block < ", num_blocks(), ", got ", block);
  }
  return owners_[static_cast<size_t>(block)];
}

void BlockPool::check_owned(int64_t block, const char* action) const {
  if (owners(block) == 0) fail("block: cannot ", action, " block ", block, ", which is free");
}

}  // namespace winnow
