#include "shared_memory.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace winnow::host {

constexpr int kWarpLanes = 32;

void SharedMemory::start_block(int threads, size_t dynamic_bytes) {
  ++block_;
  used_ = 0;
  arrays_.clear();
  copies_.assign(static_cast<size_t>(threads), Copies{});
  dynamic_bytes_ = dynamic_bytes;
  if (dynamic_bytes > 0) array(this, dynamic_bytes);
}

void SharedMemory::begin_copy(char* target, const void* bytes, int thread) {
  Copies& copies = copies_[static_cast<size_t>(thread)];
  copies.under_way.push_back({target, {}, copies.groups});
  std::memcpy(copies.under_way.back().bytes, bytes, sizeof(Copy::bytes));
  const auto first = static_cast<size_t>(target - memory_.data()) / 2;
  for (size_t i = first; i < first + sizeof(Copy::bytes) / 2; ++i) {
    cells_[i].copying = static_cast<int16_t>(thread);
  }
}

void SharedMemory::wait_copies(int thread, int latest) {
  Copies& copies = copies_[static_cast<size_t>(thread)];
  size_t left = 0;
  for (const Copy& copy : copies.under_way) {
    if (copy.group >= copies.groups - latest) {
      copies.under_way[left++] = copy;
      continue;
    }
    std::memcpy(copy.target, copy.bytes, sizeof(copy.bytes));
    const auto first = static_cast<size_t>(copy.target - memory_.data()) / 2;
    for (size_t i = first; i < first + sizeof(copy.bytes) / 2; ++i) {
      cells_[i].copying = -1;
      cells_[i].write = {ordering_.now(), static_cast<int16_t>(thread), false};
    }
  }
  copies.under_way.resize(left);
}

char* SharedMemory::array(const void* site, size_t bytes) {
  for (const Array& known : arrays_) {
    if (known.site == site) return memory_.data() + known.offset;
  }
  // A gap behind each array, so that none continues another.
  const size_t offset = (used_ + 16 + 127) / 128 * 128;
  if (offset + bytes > kCapacity) throw std::runtime_error("shared memory: more than 227 KiB");
  arrays_.push_back({site, offset, bytes});
  used_ = offset + bytes;
  std::memset(memory_.data() + offset, 0xa5, bytes);
  return memory_.data() + offset;
}

std::string SharedMemory::check(Access access, const char* address, size_t bytes, int thread) {
  const auto first = static_cast<size_t>(address - memory_.data()) / 2;
  for (size_t i = first; i < first + (bytes + 1) / 2; ++i) {
    Cell& cell = cells_[i];
    if (cell.block != block_) {
      cell = Cell{};
      cell.block = block_;
    }
    if (cell.copying >= 0) {
      return "uses shared memory before the asynchronous copy of thread " +
             std::to_string(cell.copying) + " has arrived";
    }
    const bool both_atomic = access == Access::kAtomic && cell.write.atomic;
    if (access != Access::kWrite && cell.write.time == 0) {
      return "reads shared memory that nobody has written";
    }
    if (!both_atomic && !ordered(cell.write, thread)) {
      return "uses shared memory that thread " + std::to_string(cell.write.thread) +
             " wrote, with no barrier in between";
    }
    if (access == Access::kRead) {
      if (cell.read.thread / kWarpLanes != thread / kWarpLanes) {
        cell.read_other_warp = cell.read;
      }
      cell.read = {ordering_.now(), static_cast<int16_t>(thread), false};
      continue;
    }
    for (const Use* read : {&cell.read, &cell.read_other_warp}) {
      if (!ordered(*read, thread)) {
        return "writes shared memory that thread " + std::to_string(read->thread) +
               " read, with no barrier in between";
      }
    }
    cell.write = {ordering_.now(), static_cast<int16_t>(thread), access == Access::kAtomic};
  }
  return {};
}

}  // namespace winnow::host
