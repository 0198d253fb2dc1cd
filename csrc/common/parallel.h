// Loops over torch's threads, as ThreadSanitizer can follow them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#if defined(__SANITIZE_THREAD__)
#define WINNOW_THREAD_SANITIZER
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define WINNOW_THREAD_SANITIZER
#endif
#endif
#ifdef WINNOW_THREAD_SANITIZER
#include <sanitizer/tsan_interface.h>
#endif

namespace winnow {

// Work that is not worth a second thread stays on the first, except where races are looked for: the
// small shapes of tests then meet them too.
#ifdef WINNOW_THREAD_SANITIZER
inline constexpr bool kSpreadAnyWork = true;

// torch and its OpenMP are not compiled with the sanitizer, which sees the memory and not who waits
// for whom: here it is told that every part begins after the call and ends before its return. A
// part knows the address of this before it has read anything.
template <typename Work>
struct AnnotatedWork {
  const Work& work;
  char ended = 0;

  void operator()(int64_t first, int64_t last) const {
    __tsan_acquire(const_cast<AnnotatedWork*>(this));
    work(first, last);
    __tsan_release(const_cast<char*>(&ended));
  }
};
#else
inline constexpr bool kSpreadAnyWork = false;
#endif

// work(first, last) for parts of [begin, end) of at least `grain` items, at once.
template <typename Work>
void parallel_for(int64_t begin, int64_t end, [[maybe_unused]] int64_t grain, const Work& work) {
#ifdef WINNOW_THREAD_SANITIZER
  AnnotatedWork<Work> annotated{work};
  __tsan_release(&annotated);
  torch::stable::parallel_for(begin, end, 1, annotated);
  __tsan_acquire(&annotated.ended);
#else
  torch::stable::parallel_for(begin, end, grain, work);
#endif
}

}  // namespace winnow
