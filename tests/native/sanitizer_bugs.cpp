// A mistake of each kind that the sanitizers look for, and a loop without one. Compiled like the
// operators in a build with sanitizers, and in no other; tests/test_sanitizers.py calls them.
#include <cstdint>
#include <vector>

#include "common/parallel.h"

#define WINNOW_PLANTED extern "C" __attribute__((visibility("default"))) int64_t

namespace {

int64_t sum_of_tasks(bool one_address) {
  std::vector<int64_t> sums(64, 0);
  winnow::parallel_for(0, 64, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      sums[one_address ? 0 : static_cast<size_t>(task)] += task;
    }
  });
  int64_t sum = 0;
  for (const int64_t part : sums) sum += part;
  return sum;
}

}  // namespace

WINNOW_PLANTED read_behind(const int64_t* numbers, int64_t count) {
  return numbers[count];
}

WINNOW_PLANTED successor(int64_t number) {
  return number + 1;
}

WINNOW_PLANTED race() {
  return sum_of_tasks(true);
}

WINNOW_PLANTED no_race() {
  return sum_of_tasks(false);
}
