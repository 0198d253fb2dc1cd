// The element types that loops are instantiated for, as a plain enumeration: *_simd.h headers cross
// between units that see the stable ABI and units that must not.
#pragma once

namespace winnow {

enum class ElementType : int { kFloat, kDouble, kBFloat16, kHalf };

}  // namespace winnow
