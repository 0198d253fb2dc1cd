#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

// swapcontext makes two system calls per switch; a warp shuffle is 64 switches.
#ifdef __x86_64__
extern "C" void winnow_switch_stack(void** save, void* load);
asm(R"(
.text
.globl winnow_switch_stack
.hidden winnow_switch_stack
.type winnow_switch_stack, @function
winnow_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size winnow_switch_stack, .-winnow_switch_stack
)");
#endif

namespace winnow::host {
namespace {

constexpr size_t kStack = 128 * 1024;
Fiber* starting = nullptr;  // handed to a fiber at its first instruction

size_t page() {
  return static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace

Fiber::Fiber() {
  void* memory = mmap(nullptr, kStack + page(), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  stack_ = static_cast<char*>(memory);
  mprotect(stack_, page(), PROT_NONE);  // a stack that overflows stops here
}

Fiber::~Fiber() {
  munmap(stack_, kStack + page());
}

void Fiber::enter() {
  starting->entry_(starting->argument_);
}

#ifdef __x86_64__
void Fiber::prepare(void (*entry)(void*), void* argument) {
  entry_ = entry;
  argument_ = argument;
  // As if winnow_switch_stack had been called: six registers, then the address it returns to. The
  // stack pointer at a function's first instruction is 8 modulo 16.
  auto* top = reinterpret_cast<uint64_t*>(stack_ + page() + kStack);
  top[-1] = 0;
  top[-2] = reinterpret_cast<uint64_t>(&Fiber::enter);
  for (int i = 3; i <= 8; ++i) top[-i] = 0;
  own_ = top - 8;
}

void Fiber::resume() {
  starting = this;
  winnow_switch_stack(&caller_, own_);
}

void Fiber::suspend() {
  winnow_switch_stack(&own_, caller_);
}
#else
void Fiber::prepare(void (*entry)(void*), void* argument) {
  entry_ = entry;
  argument_ = argument;
  getcontext(&own_);
  own_.uc_stack.ss_sp = stack_ + page();
  own_.uc_stack.ss_size = kStack;
  own_.uc_link = nullptr;
  makecontext(&own_, &Fiber::enter, 0);
}

void Fiber::resume() {
  starting = this;
  swapcontext(&caller_, &own_);
}

void Fiber::suspend() {
  swapcontext(&own_, &caller_);
}
#endif

}  // namespace winnow::host
