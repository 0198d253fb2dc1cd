// The designs of sampling without replacement, for the CPU and the GPU.
#pragma once

namespace winnow {

enum class Design : int { kGumbelTopK, kConditionalPoisson, kPareto };

}  // namespace winnow
