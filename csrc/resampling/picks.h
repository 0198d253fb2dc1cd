// The m largest of a stream of keys, in a heap whose root is the smallest of them. Equal keys: the
// earlier index is the larger one. No containers: *_simd.cc include this.
#pragma once

#include <cstdint>

namespace winnow {
namespace {

struct Pick {
  double key;
  int64_t index;
};

struct ByKey {
  static bool less(const Pick& a, const Pick& b) {
    return a.key < b.key || (a.key == b.key && a.index > b.index);
  }
};

// So that a sort, which ends with the largest key first, ends with the first index first.
struct ByIndex {
  static bool less(const Pick& a, const Pick& b) { return a.index > b.index; }
};

template <typename Order>
inline void sift_down(Pick* heap, int64_t n, int64_t at) {
  const Pick moved = heap[at];
  for (;;) {
    int64_t child = 2 * at + 1;
    if (child >= n) break;
    if (child + 1 < n && Order::less(heap[child + 1], heap[child])) ++child;
    if (!Order::less(heap[child], moved)) break;
    heap[at] = heap[child];
    at = child;
  }
  heap[at] = moved;
}

// The largest first.
template <typename Order>
inline void sort_picks(Pick* picks, int64_t n) {
  for (int64_t at = n / 2; at-- > 0;) sift_down<Order>(picks, n, at);
  for (int64_t end = n; end-- > 1;) {
    const Pick smallest = picks[0];
    picks[0] = picks[end];
    picks[end] = smallest;
    sift_down<Order>(picks, end, 0);
  }
}

struct Largest {
  Pick* heap;
  int64_t capacity;
  int64_t count = 0;

  // Indices come in ascending order, so an equal key never replaces one.
  void offer(double key, int64_t index) {
    if (count < capacity) {
      heap[count++] = {key, index};
      if (count == capacity) {
        for (int64_t at = count / 2; at-- > 0;) sift_down<ByKey>(heap, count, at);
      }
    } else if (capacity > 0 && key > heap[0].key) {
      heap[0] = {key, index};
      sift_down<ByKey>(heap, count, 0);
    }
  }
};

}  // namespace
}  // namespace winnow
