// Twelve independent accumulators hide the latency of a fused multiply-add on two ports; nothing
// touches memory. The bf16 form counts two multiply-adds per 32-bit lane.
#include "common/fma_rate_simd.h"

#include <ATen/cpu/vec/vec.h>

namespace winnow::CPU_CAPABILITY {

void fma_operations(long long iterations, bool bf16, double* operations) {
  constexpr int kChains = 12;
#ifdef __AVX512BF16__
  if (bf16) {
    __m512 sum[kChains];
    for (int c = 0; c < kChains; ++c) sum[c] = _mm512_set1_ps(0.1f * c);
    __m512i ones = _mm512_set1_epi32(0x3f803f80);
    for (long long i = 0; i < iterations; ++i) {
      asm volatile("" : "+v"(ones));  // keeps the loop: its operands may have changed
      for (int c = 0; c < kChains; ++c) {
        sum[c] = _mm512_dpbf16_ps(sum[c], (__m512bh)ones, (__m512bh)ones);
      }
    }
    for (int c = 0; c < kChains; ++c) asm volatile("" : : "v"(sum[c]));
    *operations = 4.0 * 16 * kChains * static_cast<double>(iterations);
    return;
  }
#endif
  (void)bf16;
  using Vec = at::vec::Vectorized<float>;
  Vec sum[kChains];
  for (int c = 0; c < kChains; ++c) sum[c] = Vec(0.1f * c);
  float factor = 0.999f;
  for (long long i = 0; i < iterations / 16; ++i) {
    asm volatile("" : "+m"(factor));  // keeps the loop: its operands may have changed
    const Vec x(factor);
#pragma GCC unroll 16
    for (int step = 0; step < 16; ++step) {
#pragma GCC unroll 12
      for (int c = 0; c < kChains; ++c) sum[c] = at::vec::fmadd(sum[c], x, x);
    }
  }
  float sink[Vec::size()];
  for (int c = 0; c < kChains; ++c) {
    sum[c].store(sink);
    asm volatile("" : : "m"(sink));
  }
  *operations = 2.0 * Vec::size() * kChains * static_cast<double>(iterations / 16 * 16);
}

}  // namespace winnow::CPU_CAPABILITY
