// Rows of the next task or tile, fetched while this one computes: they are few, and the processor,
// which sees rows of several tensors in turn, guesses none of them in time.
#pragma once

#include <cstdint>

#include "attention/problem.h"

namespace winnow::CPU_CAPABILITY {
namespace {

class Ahead {
 public:
  void start(int64_t rows, int64_t row_bytes) {
    left_ = rows;
    bytes_ = row_bytes;
    count_ = 0;
  }
  void add(const void* rows, int64_t stride_bytes) {
    next_[count_] = static_cast<const char*>(rows);
    stride_[count_++] = stride_bytes;
  }
  // The rows of one head from `row` on.
  template <typename T>
  void add(const Source& source, int64_t batch, int64_t head, int64_t row) {
    add(head_rows<T>(source, batch, head) + row * source.row,
        source.row * static_cast<int64_t>(sizeof(T)));
  }

  void fetch(int64_t rows) {
    for (; rows > 0 && left_ > 0; --rows, --left_) {
      for (int i = 0; i < count_; ++i) {
        for (int64_t x = 0; x < bytes_; x += 64) __builtin_prefetch(next_[i] + x, 0, 2);
        next_[i] += stride_[i];
      }
    }
  }

 private:
  static constexpr int kMost = 6;
  const char* next_[kMost];
  int64_t stride_[kMost];
  int count_ = 0;
  int64_t bytes_ = 0;
  int64_t left_ = 0;
};

}  // namespace
}  // namespace winnow::CPU_CAPABILITY
