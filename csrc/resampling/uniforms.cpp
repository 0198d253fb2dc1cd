// winnow::uniforms on the CPU: numbers in [0, 1) keyed by (seed, row, element).
#include <torch/csrc/stable/library.h>

#include "common/parallel.h"
#include "common/philox.h"
#include "resampling/trace_arguments.h"

namespace winnow {
namespace {

Tensor uniforms(const Tensor& seed, int64_t rows, int64_t count) {
  const uint64_t key = host_seed(seed);
  check_uniforms(rows, count);
  const Tensor result = empty({rows, count}, ScalarType::Double, seed);
  auto* out = static_cast<double*>(result.data_ptr());
  parallel_for(0, rows, 1 + 2048 / (count + 1), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t j = 0; j < count; ++j) {
        const uint64_t bits = philox_bits(key, static_cast<uint64_t>(r), static_cast<uint64_t>(j));
        out[r * count + j] = static_cast<double>(bits >> 11) * 0x1p-53;
      }
    }
  });
  return result;
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("uniforms", TORCH_BOX(&winnow::uniforms));
}
