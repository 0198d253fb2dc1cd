// Blocks as something that rows share: prefixes that are found by their tokens, and what rows hold
// together and alone.
#include <algorithm>
#include <utility>

#include "common/fail.h"
#include "kvcache/cache_table.h"

namespace winnow {

int64_t CacheTable::register_prefix(int64_t row, const Integers& tokens) {
  const auto lock = pool_->lock();
  check_row(row);
  const Row& held = rows_[static_cast<size_t>(row)];
  const int64_t count = static_cast<int64_t>(tokens.size());
  for (int64_t layer = 0; layer < layers_; ++layer) {
    const int64_t stored = filled(layer, static_cast<size_t>(row));
    if (count > stored) {
      fail("token_ids: expected at most ", stored, " tokens, as many as layer ", layer,
           " has stored in row ", row, ", got ", count);
    }
  }
  const int64_t blocks = count / block_size_;
  // Blocks that are findable already stand for this row's, whose keys are the same.
  std::vector<int32_t> chain = find_prefix(tokens);
  const size_t known = chain.size();
  chain.insert(chain.end(), held.blocks.begin() + static_cast<int64_t>(known),
               held.blocks.begin() + blocks);
  for (size_t i = known; i < chain.size(); ++i) {
    if (pool_->prefixes().has(chain[i])) {
      fail("token_ids: block ", i, " of row ", row, " is registered with other tokens");
    }
  }
  size_t added = known;
  try {
    for (; added < chain.size(); ++added) {
      const int32_t parent = added == 0 ? PrefixIndex::kNone : chain[added - 1];
      const int64_t start = static_cast<int64_t>(added) * block_size_;
      pool_->add_prefix(chain[added], parent, tokens.data() + start, block_size_);
    }
  } catch (...) {
    if (added > known) pool_->forget_prefix(chain[known]);  // and the others, which follow it
    throw;
  }
  pool_->use_prefix(chain);
  return blocks * block_size_;
}

int64_t CacheTable::match_prefix(int64_t row, const Integers& tokens) {
  const auto lock = pool_->lock();
  check_row(row);
  Row& held = rows_[static_cast<size_t>(row)];
  if (held.length > 0) {
    fail("row: expected one without tokens, got row ", row, ", which holds ", held.length);
  }
  std::vector<int32_t> chain = find_prefix(tokens);
  if (chain.empty()) return 0;
  pool_->use_prefix(chain);
  for (const int32_t block : chain) pool_->retain(block);
  held.length = static_cast<int64_t>(chain.size()) * block_size_;
  held.released = false;
  held.blocks = std::move(chain);
  for (int64_t layer = 0; layer < layers_; ++layer) {
    filled(layer, static_cast<size_t>(row)) = held.length;
  }
  mirror(static_cast<size_t>(row));
  update_width();
  return held.length;
}

std::vector<bool> CacheTable::blocks_of(const char* argument, const Integers& rows) const {
  std::vector<bool> held(static_cast<size_t>(pool_->num_blocks()), false);
  for (const int64_t r : rows) {
    if (r < 0 || r >= num_rows()) {
      fail(argument, ": expected 0 <= row < ", num_rows(), ", got ", r);
    }
    for (const int32_t block : rows_[static_cast<size_t>(r)].blocks) {
      held[static_cast<size_t>(block)] = true;
    }
  }
  return held;
}

int64_t CacheTable::retained(const Integers& rows) const {
  const auto lock = pool_->lock();
  const std::vector<bool> held = blocks_of("rows", rows);
  return std::count(held.begin(), held.end(), true);
}

CacheTable::Integers CacheTable::marginal(const Integers* kept) const {
  const auto lock = pool_->lock();
  const std::vector<bool> held = kept ? blocks_of("kept", *kept) : std::vector<bool>();
  Integers counts(rows_.size(), 0);
  for (size_t r = 0; r < rows_.size(); ++r) {
    for (const int32_t block : rows_[r].blocks) {
      if (kept) {
        counts[r] += !held[static_cast<size_t>(block)];
      } else {
        const int32_t owners = pool_->owners(block);
        counts[r] += owners == 1 || (owners == 2 && pool_->prefixes().has(block));
      }
    }
  }
  return counts;
}

std::vector<int32_t> CacheTable::find_prefix(const Integers& tokens) const {
  std::vector<int32_t> chain;
  int32_t parent = PrefixIndex::kNone;
  const int64_t blocks = static_cast<int64_t>(tokens.size()) / block_size_;
  for (int64_t i = 0; i < blocks; ++i) {
    parent = pool_->prefixes().find(parent, tokens.data() + i * block_size_, block_size_);
    if (parent == PrefixIndex::kNone) break;
    chain.push_back(parent);
  }
  return chain;
}

void CacheTable::check_row(int64_t row) const {
  if (row < 0 || row >= num_rows()) fail("row: expected 0 <= row < ", num_rows(), ", got ", row);
}

}  // namespace winnow
