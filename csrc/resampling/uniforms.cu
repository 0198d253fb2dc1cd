// winnow::uniforms on the GPU: numbers in [0, 1) keyed by (seed, row, element), as on the CPU.
#include "common/device.h"
#include "common/philox.h"

namespace winnow {
namespace {

constexpr int kThreads = 256;

WINNOW_KERNEL(kThreads)
draw_uniforms(Seed seed, int64_t count, int64_t total, Global<double> result) {
  const int64_t item = block_index() * kThreads + thread_index();
  if (item >= total) return;
  const uint64_t bits = philox_bits(seed.get(), static_cast<uint64_t>(item / count),
                                    static_cast<uint64_t>(item % count));
  result[item] = static_cast<double>(bits >> 11) * 0x1p-53;
}

// ---- launchers ----

Tensor uniforms_cuda(const Tensor& seed, int64_t rows, int64_t count) {
  check_device("seed", seed);
  const Stream stream(seed);
  WINNOW_CHECK(rows >= 0 && count >= 0, "rows, count: expected no negative numbers, got ", rows,
               " and ", count);
  Tensor result = empty({rows, count}, ScalarType::Double, seed);
  launch("uniforms", draw_uniforms, {ceil_div<int64_t>(rows * count, kThreads)}, kThreads, stream,
         seed_of(seed), count, rows * count, global<double>(result));
  return result;
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("uniforms", TORCH_BOX(&winnow::uniforms_cuda));
}
