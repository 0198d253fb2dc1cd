// Which of the compiled instruction-set variants runs. Detected once, lowered by the environment
// variable WINNOW_CPU_CAPABILITY (default, avx2, avx512, avx512_bf16), switched by tests.
#pragma once

namespace winnow {

enum class CpuCapability : int { kDefault = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

CpuCapability cpu_capability();

}  // namespace winnow

// Names an instruction-set variant's namespace. A *_simd.h declares its entry points with
// WINNOW_SIMD_DECLARE, a *_simd.cc defines them inside `namespace winnow::CPU_CAPABILITY`, and the
// op calls WINNOW_SIMD(name)(...). WINNOW_ONLY_CAPABILITY: the one variant that there is.
#ifndef WINNOW_ONLY_CAPABILITY
#define WINNOW_SIMD_DECLARE(name, ...) \
  namespace DEFAULT {                  \
  void name(__VA_ARGS__);              \
  }                                    \
  namespace AVX2 {                     \
  void name(__VA_ARGS__);              \
  }                                    \
  namespace AVX512 {                   \
  void name(__VA_ARGS__);              \
  }                                    \
  namespace AVX512_BF16 {              \
  void name(__VA_ARGS__);              \
  }
#define WINNOW_SIMD(name)                                                                        \
  (::winnow::pick_simd(&::winnow::DEFAULT::name, &::winnow::AVX2::name, &::winnow::AVX512::name, \
                       &::winnow::AVX512_BF16::name))
#else
#define WINNOW_SIMD_DECLARE(name, ...) \
  namespace WINNOW_ONLY_CAPABILITY {   \
  void name(__VA_ARGS__);              \
  }
#define WINNOW_SIMD(name) (&::winnow::WINNOW_ONLY_CAPABILITY::name)
#endif

namespace winnow {

template <typename Fn>
Fn* pick_simd(Fn* base, Fn* avx2, Fn* avx512, Fn* avx512_bf16) {
  switch (cpu_capability()) {
    case CpuCapability::kAvx512Bf16:
      return avx512_bf16;
    case CpuCapability::kAvx512:
      return avx512;
    case CpuCapability::kAvx2:
      return avx2;
    default:
      return base;
  }
}

}  // namespace winnow
