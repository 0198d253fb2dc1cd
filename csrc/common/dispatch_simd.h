// Inside a *_simd.cc: from an ElementType to a typed call. fn receives T{}.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "common/element_type.h"

namespace winnow {
namespace {

template <typename Fn>
inline void dispatch_element(ElementType type, const Fn& fn) {
  switch (type) {
    case ElementType::kFloat:
      return fn(float{});
    case ElementType::kDouble:
      return fn(double{});
    case ElementType::kBFloat16:
      return fn(c10::BFloat16{});
    case ElementType::kHalf:
      return fn(c10::Half{});
  }
}

}  // namespace
}  // namespace winnow
