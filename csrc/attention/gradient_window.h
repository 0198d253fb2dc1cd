// Sums of local key and value gradients for the rows that still receive some: a window that moves
// along the rows, so that memory is bounded by the chunk and not by the sequence.
#pragma once

#include <cstdint>
#include <cstring>

#include "attention/scratch.h"

namespace winnow::CPU_CAPABILITY {
namespace {

template <typename Acc>
class GradientWindow {
 public:
  void attach(Scratch& scratch, int64_t capacity, int64_t ld) {
    capacity_ = capacity;
    ld_ = ld;
    key_ = scratch.take<Acc>(capacity * ld);
    value_ = scratch.take<Acc>(capacity * ld);
  }

  void restart(int64_t row) { base_ = begin_ = end_ = row; }

  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }

  // Where the row lies, or would lie: callers index from row 0.
  Acc* key(int64_t row) const { return key_ + (row - base_) * ld_; }
  Acc* value(int64_t row) const { return value_ + (row - base_) * ld_; }

  void drop_before(int64_t row) { begin_ = row > begin_ ? row : begin_; }

  // Adds zero rows up to `row`.
  void extend(int64_t row) {
    if (row <= end_) return;
    if (row - base_ > capacity_) {
      const auto bytes = static_cast<size_t>((end_ - begin_) * ld_) * sizeof(Acc);
      std::memmove(key_, key(begin_), bytes);
      std::memmove(value_, value(begin_), bytes);
      base_ = begin_;
    }
    const auto bytes = static_cast<size_t>((row - end_) * ld_) * sizeof(Acc);
    std::memset(key(end_), 0, bytes);
    std::memset(value(end_), 0, bytes);
    end_ = row;
  }

 private:
  Acc* key_ = nullptr;
  Acc* value_ = nullptr;
  int64_t capacity_ = 0;
  int64_t ld_ = 0;
  int64_t base_ = 0;   // row at the start of the memory
  int64_t begin_ = 0;  // first row that is still needed
  int64_t end_ = 0;
};

}  // namespace
}  // namespace winnow::CPU_CAPABILITY
