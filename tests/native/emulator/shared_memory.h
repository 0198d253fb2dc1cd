// A block's shared memory and, for every two bytes of it, who wrote and read it last and when: a
// read of what was never written, and two accesses that no barrier orders, are faults. What a
// thread copies asynchronously arrives when that thread waits for it; any use before is a fault.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "ordering.h"

namespace winnow::host {

class SharedMemory {
 public:
  explicit SharedMemory(const Ordering& ordering) : ordering_(ordering) {}

  // Forgets everything: a block starts with undefined contents.
  void start_block(int threads, size_t dynamic_bytes);

  // The array that `site` names, the same one for every thread of the block.
  char* array(const void* site, size_t bytes);
  // The memory whose size the launch names; null where it is less than `bytes`.
  char* dynamic(size_t bytes) { return bytes <= dynamic_bytes_ ? array(this, bytes) : nullptr; }

  // 16 bytes on their way to `target`, which passed check() as a write.
  void begin_copy(char* target, const void* bytes, int thread);
  void commit_copies(int thread) { ++copies_[static_cast<size_t>(thread)].groups; }
  // All groups of the thread but the latest ones arrive.
  void wait_copies(int thread, int latest);
  bool copies_in_flight(int thread) const {
    return !copies_[static_cast<size_t>(thread)].under_way.empty();
  }

  // What is wrong with this access, or an empty string.
  std::string check(Access access, const char* address, size_t bytes, int thread);

 private:
  struct Use {
    uint32_t time = 0;  // 0: never
    int16_t thread = -1;
    bool atomic = false;
  };
  struct Cell {
    uint32_t block = 0;  // older than the running block's number: untouched
    Use write;
    Use read;              // the latest
    Use read_other_warp;   // the latest by another warp than that one
    int16_t copying = -1;  // the thread whose copy is under way
  };
  struct Array {
    const void* site;
    size_t offset;
    size_t bytes;
  };

  struct Copy {
    char* target;
    char bytes[16];
    int64_t group;
  };
  struct Copies {
    int64_t groups = 0;  // committed
    std::vector<Copy> under_way;
  };

  bool ordered(const Use& earlier, int thread) const {
    return ordering_.ordered(earlier.time, earlier.thread, thread);
  }

  static constexpr size_t kCapacity = 227 * 1024;  // of sm_90
  const Ordering& ordering_;
  std::vector<char> memory_ = std::vector<char>(kCapacity);
  std::vector<Cell> cells_ = std::vector<Cell>(kCapacity / 2);
  std::vector<Array> arrays_;
  std::vector<Copies> copies_;  // per thread
  size_t used_ = 0;
  size_t dynamic_bytes_ = 0;
  uint32_t block_ = 0;
};

}  // namespace winnow::host
