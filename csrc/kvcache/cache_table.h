// The block table of one PagedKVCache: which blocks hold the tokens of each row, how far each layer
// has filled them, and which blocks must be copied before a write. It owns its blocks; the last
// owner returns a block to the pool. Every operation checks and allocates first and changes
// afterwards: one that throws, for want of memory too, has changed nothing. Every one holds the
// pool's lock, so several threads may use tables on one pool, and read one table.
//
// The tables that kernels read are tensors of Python's. attach() gives their memory, and every
// operation keeps them in step; the vectors here are what is true.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kvcache/block_pool.h"

namespace winnow {

class CacheTable {
 public:
  using Integers = std::vector<int64_t>;
  struct Copy {
    int32_t source;
    int32_t target;
  };

  CacheTable(std::shared_ptr<BlockPool> pool, int64_t rows, int64_t layers, int64_t block_size);
  ~CacheTable();
  CacheTable(const CacheTable&) = delete;
  CacheTable& operator=(const CacheTable&) = delete;

  int64_t num_rows() const { return static_cast<int64_t>(rows_.size()); }
  int64_t width() const { return width_; }  // blocks of the longest row
  int64_t capacity() const { return capacity_; }

  // The mirror: table (rows, capacity) int32, -1 where there is no block, and lengths (rows,)
  // int32. Valid until the next attach. While width() > capacity() the table is out of step.
  void attach(int32_t* table, int64_t capacity, int32_t* lengths);

  // Makes room behind what `layer` has filled, lengths[r] of `tokens` in row r (all of them without
  // lengths), and tells each token's position, positions (rows, tokens), -1 for none.
  void append(int64_t layer, int64_t tokens, const Integers* lengths, int64_t* positions);
  // Makes the blocks of positions (rows, tokens) this cache's alone; with `absent`, -1 is none.
  void write(int64_t layer, int64_t tokens, const int64_t* positions, bool absent = false);
  // Whether every layer has stored as much as the furthest one, in every row.
  bool even() const;
  std::unique_ptr<CacheTable> fork(const Integers& parents) const;
  void permute(const Integers& ancestors);
  void truncate(const Integers& lengths);
  void free(const Integers& rows);

  // Makes the full blocks of a row findable by the tokens in them, from the row's first on; returns
  // how many tokens are findable now.
  int64_t register_prefix(int64_t row, const Integers& tokens);
  // Gives an empty row the longest run of such blocks; returns the tokens they hold.
  int64_t match_prefix(int64_t row, const Integers& tokens);

  // Distinct blocks that these rows hold.
  int64_t retained(const Integers& rows) const;
  // Per row, the blocks that no row of `kept` holds; without `kept`, that no other row of any table
  // holds: what free() gives back, at once or, of a registered block, as soon as it is needed.
  Integers marginal(const Integers* kept) const;

  // Whether the last append or write changed the table or the lengths.
  bool changed() const { return changed_; }
  // Copies that the last append or write asks for, in any order, before the tokens are stored.
  const std::vector<Copy>& copies() const { return copies_; }
  // Blocks that the last append took from the pool and that are no copies.
  const std::vector<int32_t>& fresh() const { return fresh_; }

 private:
  struct Row {
    std::vector<int32_t> blocks;
    int64_t length = 0;     // that of the furthest layer
    bool released = false;  // freed and not appended to since
  };
  struct Shared {
    size_t row;
    size_t index;
  };

  int64_t& filled(int64_t layer, size_t row) {
    return filled_[static_cast<size_t>(layer) * rows_.size() + row];
  }
  void check_layer(int64_t layer) const;
  void check_row(int64_t row) const;
  // The registered blocks that the tokens begin with.
  std::vector<int32_t> find_prefix(const Integers& tokens) const;
  void check_count(const char* argument, const Integers& values) const;
  std::vector<bool> blocks_of(const char* argument, const Integers& rows) const;
  // What a write is about to change. It gives shares of blocks up to find out what it needs, and
  // takes them back unless the write comes about.
  class Claim;
  void copy_shared();
  void shrink(Row& row, int64_t length);
  void update_width();
  void mirror(size_t row);

  std::shared_ptr<BlockPool> pool_;
  int64_t layers_;
  int64_t block_size_;
  std::vector<Row> rows_;
  std::vector<int64_t> filled_;  // (layers, rows): tokens that a layer has stored
  std::vector<Shared> shared_;
  std::vector<int32_t> written_;  // blocks that the prefix index will have to forget
  std::vector<Copy> copies_;
  bool changed_ = false;
  std::vector<int32_t> fresh_;
  int64_t width_ = 0;
  int32_t* table_ = nullptr;
  int32_t* lengths_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace winnow
