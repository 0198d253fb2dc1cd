#include "kvcache/cache_table.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "common/fail.h"

namespace winnow {
namespace {

constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max();

}  // namespace

class CacheTable::Claim {
 public:
  explicit Claim(CacheTable& table) : table_(table), pool_(*table.pool_) {
    table.shared_.clear();
    table.written_.clear();
    table.copies_.clear();
  }
  Claim(const Claim&) = delete;
  Claim& operator=(const Claim&) = delete;
  ~Claim() {
    if (taken_) return;
    for (const Shared& share : table_.shared_) {
      pool_.retain(table_.rows_[share.row].blocks[share.index]);
    }
  }

  // Block `index` of a row is to be the row's alone.
  void unshare(size_t row, size_t index) {
    const int32_t block = table_.rows_[row].blocks[index];
    if (pool_.owners(block) == 1) return;
    // A block that came twice has already given its share up.
    std::vector<Shared>& shared = table_.shared_;
    for (auto share = shared.rbegin(); share != shared.rend() && share->row == row; ++share) {
      if (share->index == index) return;
    }
    // What nobody else but the prefix index holds is forgotten there instead of copied.
    if (pool_.owners(block) == 2 && pool_.prefixes().has(block)) {
      std::vector<int32_t>& written = table_.written_;
      if (written.empty() || written.back() != block) written.push_back(block);
      return;
    }
    shared.push_back({row, index});
    pool_.release(block);
  }

  // Takes `fresh` blocks and one for each shared one. The last thing that may throw.
  void take(int64_t fresh) {
    table_.copies_.reserve(table_.shared_.size());
    pool_.require(fresh + static_cast<int64_t>(table_.shared_.size()));
    taken_ = true;
    table_.changed_ = !table_.shared_.empty();
    table_.copy_shared();
  }

 private:
  CacheTable& table_;
  BlockPool& pool_;
  bool taken_ = false;
};

CacheTable::CacheTable(std::shared_ptr<BlockPool> pool, int64_t rows, int64_t layers,
                       int64_t block_size)
    : pool_(std::move(pool)), layers_(layers), block_size_(block_size) {
  if (rows < 0) fail("batch_size: expected at least 0, got ", rows);
  if (rows > kMaxLength) fail("batch_size: expected fewer than 2**31, got ", rows);
  rows_.resize(static_cast<size_t>(rows));
  filled_.assign(static_cast<size_t>(layers * rows), 0);
}

CacheTable::~CacheTable() {
  const auto lock = pool_->lock();
  for (const Row& row : rows_) {
    for (const int32_t block : row.blocks) pool_->release(block);
  }
}

void CacheTable::attach(int32_t* table, int64_t capacity, int32_t* lengths) {
  const auto lock = pool_->lock();
  if (width_ > capacity) fail("capacity: expected at least ", width_, ", got ", capacity);
  table_ = table;
  capacity_ = capacity;
  lengths_ = lengths;
  for (size_t r = 0; r < rows_.size(); ++r) mirror(r);
}

void CacheTable::append(int64_t layer, int64_t tokens, const Integers* lengths,
                        int64_t* positions) {
  const auto lock = pool_->lock();
  check_layer(layer);
  if (lengths) check_count("lengths", *lengths);
  fresh_.clear();
  Claim claim(*this);
  int64_t fresh = 0;
  for (size_t r = 0; r < rows_.size(); ++r) {
    const int64_t count = lengths ? (*lengths)[r] : tokens;
    const int64_t start = filled(layer, r);
    if (count < 0 || count > tokens) {
      fail("lengths: expected 0 <= length <= ", tokens, " (the tokens in key), got ", count,
           " for row ", r);
    }
    if (count > kMaxLength - start) fail("key: row ", r, " would hold more than 2**31 tokens");
    if (count == 0) continue;
    std::vector<int32_t>& blocks = rows_[r].blocks;
    const int64_t held = static_cast<int64_t>(blocks.size());
    const int64_t last = (start + count - 1) / block_size_;
    fresh += std::max<int64_t>(0, last + 1 - held);
    // A row of more blocks than the pool has is refused below: no memory is held for it.
    if (static_cast<size_t>(last) >= blocks.capacity() && last < pool_->num_blocks()) {
      blocks.reserve(std::max(static_cast<size_t>(last) + 1, 2 * blocks.capacity()));
    }
    for (int64_t i = start / block_size_; i <= std::min(last, held - 1); ++i) {
      claim.unshare(r, static_cast<size_t>(i));
    }
  }
  fresh_.reserve(static_cast<size_t>(std::min(fresh, pool_->num_blocks())));
  claim.take(fresh);

  bool grew = false;
  for (size_t r = 0; r < rows_.size(); ++r) {
    const int64_t count = lengths ? (*lengths)[r] : tokens;
    int64_t& start = filled(layer, r);
    int64_t* row_positions = positions + static_cast<int64_t>(r) * tokens;
    for (int64_t t = 0; t < tokens; ++t) row_positions[t] = t < count ? start + t : -1;
    if (count == 0) continue;
    start += count;
    Row& row = rows_[r];
    row.released = false;
    if (start <= row.length) continue;
    row.length = start;
    changed_ = true;
    if (lengths_) lengths_[r] = static_cast<int32_t>(start);
    const size_t needed = static_cast<size_t>((start + block_size_ - 1) / block_size_);
    while (row.blocks.size() < needed) {
      row.blocks.push_back(pool_->allocate());
      fresh_.push_back(row.blocks.back());
      const int64_t index = static_cast<int64_t>(row.blocks.size()) - 1;
      if (index < capacity_) {
        table_[static_cast<int64_t>(r) * capacity_ + index] = row.blocks.back();
      }
      grew = true;
    }
  }
  if (grew) update_width();
}

void CacheTable::write(int64_t layer, int64_t tokens, const int64_t* positions, bool absent) {
  const auto lock = pool_->lock();
  check_layer(layer);
  for (size_t r = 0; r < rows_.size(); ++r) {
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t position = positions[static_cast<int64_t>(r) * tokens + t];
      if (absent && position == -1) continue;
      if (position < 0 || position >= rows_[r].length) {
        fail("positions: expected 0 <= position < ", rows_[r].length, " (the length of row ", r,
             "), got ", position);
      }
    }
  }
  Claim claim(*this);
  for (size_t r = 0; r < rows_.size(); ++r) {
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t position = positions[static_cast<int64_t>(r) * tokens + t];
      if (position >= 0) claim.unshare(r, static_cast<size_t>(position / block_size_));
    }
  }
  claim.take(0);
}

bool CacheTable::even() const {
  const auto lock = pool_->lock();
  for (size_t i = 0; i < filled_.size(); ++i) {
    if (filled_[i] != rows_[i % rows_.size()].length) return false;
  }
  return true;
}

std::unique_ptr<CacheTable> CacheTable::fork(const Integers& parents) const {
  // Ends after the lock: a child that is only half made gives its blocks back under it.
  std::unique_ptr<CacheTable> child;
  const auto lock = pool_->lock();
  for (const int64_t parent : parents) {
    if (parent < 0 || parent >= num_rows()) {
      fail("parents: expected 0 <= parent < ", num_rows(), ", got ", parent);
    }
  }
  child = std::make_unique<CacheTable>(pool_, static_cast<int64_t>(parents.size()), layers_,
                                       block_size_);
  for (size_t r = 0; r < parents.size(); ++r) {
    const size_t parent = static_cast<size_t>(parents[r]);
    child->rows_[r] = rows_[parent];
    for (const int32_t block : rows_[parent].blocks) pool_->retain(block);
    for (int64_t layer = 0; layer < layers_; ++layer) {
      child->filled(layer, r) = filled_[static_cast<size_t>(layer) * rows_.size() + parent];
    }
  }
  child->update_width();
  return child;
}

void CacheTable::permute(const Integers& ancestors) {
  const auto lock = pool_->lock();
  check_count("ancestors", ancestors);
  std::vector<int64_t> heirs(rows_.size(), 0);
  for (const int64_t ancestor : ancestors) {
    if (ancestor < 0 || ancestor >= num_rows()) {
      fail("ancestors: expected 0 <= ancestor < ", num_rows(), ", got ", ancestor);
    }
    ++heirs[static_cast<size_t>(ancestor)];
  }
  // The last heir takes its ancestor's blocks over, the others share copies of its list.
  std::vector<Row> rows(rows_.size());
  std::vector<int64_t> stored(filled_.size());
  std::vector<int64_t> left = heirs;
  for (size_t r = 0; r < rows.size(); ++r) {
    const size_t ancestor = static_cast<size_t>(ancestors[r]);
    if (--left[ancestor] > 0) rows[r] = rows_[ancestor];
    for (size_t layer = 0; layer < stored.size(); layer += rows.size()) {
      stored[layer + r] = filled_[layer + ancestor];
    }
  }
  // Nothing allocates from here on.
  for (size_t r = 0; r < rows.size(); ++r) {
    for (const int32_t block : rows[r].blocks) pool_->retain(block);
    if (heirs[r] > 0) continue;
    for (const int32_t block : rows_[r].blocks) pool_->release(block);
  }
  for (size_t r = 0; r < rows.size(); ++r) {
    const size_t ancestor = static_cast<size_t>(ancestors[r]);
    if (--heirs[ancestor] == 0) rows[r] = std::move(rows_[ancestor]);
  }
  rows_.swap(rows);
  filled_.swap(stored);
  for (size_t r = 0; r < rows_.size(); ++r) {
    if (ancestors[r] != static_cast<int64_t>(r)) mirror(r);
  }
  update_width();
}

void CacheTable::truncate(const Integers& lengths) {
  const auto lock = pool_->lock();
  check_count("lengths", lengths);
  for (size_t r = 0; r < rows_.size(); ++r) {
    if (lengths[r] < 0 || lengths[r] > rows_[r].length) {
      fail("lengths: expected 0 <= length <= ", rows_[r].length, " (the length of row ", r,
           "), got ", lengths[r]);
    }
  }
  for (size_t r = 0; r < rows_.size(); ++r) {
    if (lengths[r] == rows_[r].length) continue;
    shrink(rows_[r], lengths[r]);
    for (int64_t layer = 0; layer < layers_; ++layer) {
      filled(layer, r) = std::min(filled(layer, r), lengths[r]);
    }
    mirror(r);
  }
  update_width();
}

void CacheTable::free(const Integers& rows) {
  const auto lock = pool_->lock();
  std::vector<bool> seen(rows_.size(), false);
  for (const int64_t r : rows) {
    if (r < 0 || r >= num_rows()) fail("rows: expected 0 <= row < ", num_rows(), ", got ", r);
    const size_t row = static_cast<size_t>(r);
    if (rows_[row].released || seen[row]) fail("rows: row ", r, " is already free");
    seen[row] = true;
  }
  for (const int64_t r : rows) {
    const size_t row = static_cast<size_t>(r);
    shrink(rows_[row], 0);
    rows_[row].released = true;
    for (int64_t layer = 0; layer < layers_; ++layer) filled(layer, row) = 0;
    mirror(row);
  }
  update_width();
}

void CacheTable::check_layer(int64_t layer) const {
  if (layer < 0 || layer >= layers_) {
    fail("layer: expected 0 <= layer < ", layers_, ", got ", layer);
  }
}

void CacheTable::check_count(const char* argument, const Integers& values) const {
  if (static_cast<int64_t>(values.size()) != num_rows()) {
    fail(argument, ": expected one per row, ", num_rows(), ", got ", values.size());
  }
}

void CacheTable::copy_shared() {
  for (const int32_t block : written_) {
    if (pool_->prefixes().has(block)) pool_->forget_prefix(block);
  }
  for (const Shared& share : shared_) {
    int32_t& block = rows_[share.row].blocks[share.index];
    const int32_t copy = pool_->allocate();
    copies_.push_back({block, copy});
    block = copy;
    if (static_cast<int64_t>(share.index) < capacity_) {
      table_[static_cast<int64_t>(share.row) * capacity_ + static_cast<int64_t>(share.index)] =
          copy;
    }
  }
}

void CacheTable::shrink(Row& row, int64_t length) {
  const size_t needed = static_cast<size_t>((length + block_size_ - 1) / block_size_);
  while (row.blocks.size() > needed) {
    pool_->release(row.blocks.back());
    row.blocks.pop_back();
  }
  row.length = length;
}

void CacheTable::update_width() {
  size_t width = 0;
  for (const Row& row : rows_) width = std::max(width, row.blocks.size());
  width_ = static_cast<int64_t>(width);
}

void CacheTable::mirror(size_t r) {
  if (lengths_) lengths_[r] = static_cast<int32_t>(rows_[r].length);
  if (!table_) return;
  const std::vector<int32_t>& blocks = rows_[r].blocks;
  int32_t* out = table_ + static_cast<int64_t>(r) * capacity_;
  const int64_t held = std::min(capacity_, static_cast<int64_t>(blocks.size()));
  std::copy(blocks.begin(), blocks.begin() + held, out);
  std::fill(out + held, out + capacity_, -1);
}

}  // namespace winnow
