// Hands out cache-line-aligned pieces of a thread's scratch memory.
#pragma once

#include <cstdint>

namespace winnow {
namespace {

class Scratch {
 public:
  explicit Scratch(void* memory) : next_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    next_ += (64 - reinterpret_cast<uintptr_t>(next_) % 64) % 64;
    T* piece = reinterpret_cast<T*>(next_);
    next_ += count * static_cast<int64_t>(sizeof(T));
    return piece;
  }

 private:
  char* next_;
};

}  // namespace
}  // namespace winnow
