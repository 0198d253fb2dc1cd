// Who wrote and read each element of global memory in the running launch: two accesses that nothing
// orders, one of them a write, are a fault. Threads of a block are ordered by barriers, blocks
// where they meet, and atomic operations need no order among themselves. Launches follow one
// another.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "ordering.h"

namespace winnow::host {

class GlobalMemory {
 public:
  static GlobalMemory& device();

  // When and by whom something is done.
  struct Moment {
    uint32_t block;     // number_of
    uint32_t meetings;  // with other blocks, before it
    int thread;
    const Ordering* ordering;  // of the block's threads
  };

  void start_launch(int64_t blocks_x, int64_t blocks_y);
  uint32_t number_of(int64_t x, int64_t y) const {
    return first_ + static_cast<uint32_t>(y * blocks_x_ + x);
  }
  // A block meets those that use the same counter.
  void join(uint32_t block, const void* counter) { teams_[block - first_] = counter; }

  // What is wrong with this access, or an empty string. `unit`: a power of two that divides the
  // address and the length; no two threads share less than one.
  std::string check(Access access, const char* address, size_t bytes, size_t unit,
                    const Moment& now);

 private:
  struct Use {
    uint32_t block = 0;  // older than the launch's first: nothing that counts
    uint32_t meetings = 0;
    uint32_t time = 0;
    int16_t thread = -1;
    bool atomic = false;
  };
  struct Cell {
    Use write;
    Use atomic;            // the latest by another thread than `write`, if that is atomic too
    Use read;              // the latest
    Use read_other_warp;   // the latest by another warp of its block
    Use read_other_block;  // the latest by another block
  };
  struct Page {
    size_t unit;  // bytes of a cell
    std::vector<Cell> cells;
  };
  struct Recent {
    uintptr_t number = 0;
    Page* page = nullptr;
  };

  Page& page_of(uintptr_t number, size_t unit);
  bool ordered(const Use& earlier, const Moment& now) const;
  // Notes the access and returns an earlier one that it must not meet, or null.
  const Use* collide(Access access, const Moment& now, Cell* cell) const;
  std::string who(const Use& use, const Moment& now) const;

  std::unordered_map<uintptr_t, Page> pages_;
  std::array<Recent, 256> recent_;  // what pages_ finds, by the last bits of the number
  int64_t blocks_x_ = 1;
  uint32_t first_ = 1;  // number of the launch's first block
  uint32_t end_ = 1;
  std::vector<const void*> teams_;  // the counter of each block; null where it met no other
};

}  // namespace winnow::host
