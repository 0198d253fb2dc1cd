// How the products of an element type are computed on this instruction set.
#pragma once

#include <type_traits>

#include "attention/dot_bf16.h"
#include "attention/operands.h"
#include "common/dispatch_simd.h"

namespace winnow::CPU_CAPABILITY {
namespace {

// fn receives a zero of the element type and an object of the class that multiplies.
template <typename Fn>
inline void with_arithmetic(ElementType type, const Fn& fn) {
  dispatch_element(type, [&](auto zero) {
    using T = decltype(zero);
    using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
#ifdef __AVX512BF16__
    fn(zero, std::conditional_t<std::is_same_v<T, c10::BFloat16>, DotBf16, Multiply<Acc>>{});
#else
    fn(zero, Multiply<Acc>{});
#endif
  });
}

}  // namespace
}  // namespace winnow::CPU_CAPABILITY
