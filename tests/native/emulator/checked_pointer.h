// Pointers of device code. Each access is looked up: outside of what the tensor spans, misaligned,
// shared memory that was never written, and what two threads use with nothing to order them.
#pragma once

#include <cstddef>
#include <cstring>
#include <sstream>
#include <type_traits>

#include "block.h"

namespace winnow::host {

// Where a pointer may point, and how an access is checked there.
template <bool kShared>
struct Bounds {
  const char* begin = nullptr;
  const char* end = nullptr;

  // unit: bytes that no two threads share.
  void check(Access access, const char* address, size_t bytes, size_t alignment,
             size_t unit) const {
    Block& block = Block::current();
    if (begin == nullptr || address < begin || address + bytes > end) {
      std::ostringstream text;
      text << (access == Access::kRead ? "reads " : "writes ") << bytes << " bytes of "
           << (kShared ? "shared" : "global") << " memory at byte " << (address - begin) << " of "
           << (end - begin);
      block.fault(text.str());
    }
    if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
      block.fault("uses memory that is not aligned to " + std::to_string(alignment) + " bytes");
    }
    const std::string problem = kShared
                                    ? block.shared().check(access, address, bytes, block.thread())
                                    : block.check_global(access, address, bytes, unit);
    if (!problem.empty()) block.fault(problem);
  }
};

template <typename T, bool kShared>
class Pointer;

// What p[i] is: a load when it is converted, a store when it is assigned to.
template <typename T, bool kShared>
class Element {
 public:
  explicit Element(Pointer<T, kShared> at) : at_(at) {}
  Element(const Element&) = delete;
  operator T() const { return at_.load(); }  // NOLINT: as an lvalue of type T would
  T operator=(const T& value) {              // NOLINT
    at_.store(value);
    return value;
  }
  T operator=(const Element& other) { return *this = static_cast<T>(other); }  // NOLINT
  T operator+=(const T& value) { return *this = at_.load() + value; }          // NOLINT

 private:
  Pointer<T, kShared> at_;
};

template <typename T, bool kShared>
class Pointer {
 public:
  using Value = std::remove_const_t<T>;
  static_assert(std::is_trivially_copyable_v<Value>);
  static_assert(!kShared || sizeof(T) % 2 == 0, "shared memory is watched in units of two bytes");

  Pointer() = default;
  Pointer(std::nullptr_t) {}  // NOLINT: as of a plain pointer
  Pointer(T* at, Bounds<kShared> bounds) : at_(at), bounds_(bounds) {}
  operator Pointer<const T, kShared>() const { return {at_, bounds_}; }  // NOLINT
  explicit operator bool() const { return at_ != nullptr; }

  Pointer operator+(int64_t offset) const { return {at_ + offset, bounds_}; }
  Pointer operator-(int64_t offset) const { return {at_ - offset, bounds_}; }
  Pointer& operator+=(int64_t offset) { return *this = *this + offset; }

  decltype(auto) operator[](int64_t offset) const { return *(*this + offset); }
  auto operator*() const {
    if constexpr (std::is_const_v<T>) {
      return load();
    } else {
      return Element<T, kShared>(*this);
    }
  }

  Value load(size_t alignment = alignof(Value)) const { return load_as<Value>(alignment); }
  template <typename U>
  U load_as(size_t alignment = alignof(U)) const {
    bounds_.check(Access::kRead, bytes(), sizeof(U), alignment, kUnit);
    U value;
    std::memcpy(&value, at_, sizeof(U));
    return value;
  }
  template <typename U>
  void store(const U& value) const {
    bounds_.check(Access::kWrite, bytes(), sizeof(U), alignof(U), kUnit);
    std::memcpy(at_, &value, sizeof(U));
  }
  // Where a write of these bytes may go.
  char* writable(size_t bytes_written) const {
    bounds_.check(Access::kWrite, bytes(), bytes_written, bytes_written, kUnit);
    return reinterpret_cast<char*>(at_);
  }
  // Where threads add one after another.
  T* counter() const {
    bounds_.check(Access::kAtomic, bytes(), sizeof(T), alignof(T), kUnit);
    return at_;
  }
  // Fibers switch only where they wait, so that any read-modify-write is indivisible.
  Value fetch_add(Value value) const {
    bounds_.check(Access::kAtomic, bytes(), sizeof(Value), alignof(Value), kUnit);
    const Value before = *at_;
    *at_ = before + value;
    return before;
  }
  Value fetch_or(Value value) const {
    bounds_.check(Access::kAtomic, bytes(), sizeof(Value), alignof(Value), kUnit);
    const Value before = *at_;
    *at_ = before | value;
    return before;
  }

 private:
  static constexpr size_t kUnit = alignof(Value) < 8 ? alignof(Value) : 8;

  const char* bytes() const { return reinterpret_cast<const char*>(at_); }

  T* at_ = nullptr;
  Bounds<kShared> bounds_;
};

}  // namespace winnow::host
