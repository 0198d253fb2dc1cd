// One thread of execution with a stack of its own, resumed and suspended by hand.
#pragma once

#include <cstddef>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace winnow::host {

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls entry(argument), which must end with suspend(): it never returns.
  void prepare(void (*entry)(void*), void* argument);
  void resume();
  void suspend();

 private:
  static void enter();

  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  char* stack_;
#ifdef __x86_64__
  void* own_ = nullptr;
  void* caller_ = nullptr;
#else
  ucontext_t own_;
  ucontext_t caller_;
#endif
};

}  // namespace winnow::host
