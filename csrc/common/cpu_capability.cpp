#include "common/cpu_capability.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "common/fma_rate_simd.h"

namespace winnow {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_bf16"};

// The only variant goes by the name of the weakest, whatever it is.
CpuCapability detect() {
#ifndef WINNOW_ONLY_CAPABILITY
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  // All but the first processors with bf16 dot products permute bytes too.
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512vnni")) {
    return CpuCapability::kAvx512Bf16;
  }
  if (avx512) return CpuCapability::kAvx512;
  if (avx2) return CpuCapability::kAvx2;
#endif
  return CpuCapability::kDefault;
}

int from_name(const char* name) {
  for (int i = 0; i < 4; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) return i;
  }
  return -1;
}

// The Python layer checks the variable at import and explains; here a value that cannot be honoured
// is ignored, because running an instruction that the machine lacks would kill the process.
CpuCapability initial() {
  const CpuCapability best = detect();
  if (const char* wanted = std::getenv("WINNOW_CPU_CAPABILITY")) {
    const int index = from_name(wanted);
    if (index >= 0 && index <= static_cast<int>(best)) return static_cast<CpuCapability>(index);
  }
  return best;
}

std::atomic<CpuCapability>& current() {
  static std::atomic<CpuCapability> value{initial()};
  return value;
}

}  // namespace

CpuCapability cpu_capability() {
  return current().load(std::memory_order_relaxed);
}

}  // namespace winnow

// A C interface of four functions, read with ctypes: none takes a tensor, so none is an operator.
#define WINNOW_EXPORT extern "C" __attribute__((visibility("default")))

WINNOW_EXPORT const char* winnow_cpu_capability() {
  return winnow::kNames[static_cast<int>(winnow::cpu_capability())];
}

WINNOW_EXPORT const char* winnow_best_cpu_capability() {
  return winnow::kNames[static_cast<int>(winnow::detect())];
}

// 1 where the machine has it and it is now in use, else 0.
WINNOW_EXPORT int winnow_set_cpu_capability(const char* name) {
  const int index = winnow::from_name(name);
  if (index < 0 || index > static_cast<int>(winnow::detect())) return 0;
  winnow::current().store(static_cast<winnow::CpuCapability>(index));
  return 1;
}

// Floating-point operations done: `iterations` rounds of independent multiply-adds in registers.
WINNOW_EXPORT double winnow_fma_operations(long long iterations, int bf16) {
  double operations = 0;
  WINNOW_SIMD(fma_operations)(iterations, bf16 != 0, &operations);
  return operations;
}
