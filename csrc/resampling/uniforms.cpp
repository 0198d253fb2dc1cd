// winnow::uniforms on the CPU: numbers in [0, 1) keyed by (seed, row, element).
#include <torch/csrc/stable/library.h>

#include "common/checks.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "common/tensors.h"

namespace winnow {
namespace {

Tensor uniforms(const Tensor& seed, int64_t rows, int64_t count) {
  check_cpu("seed", seed);
  check_dtype("seed", seed, ScalarType::Long);
  check_dim("seed", seed, 0, "one number");
  WINNOW_CHECK(rows >= 0 && count >= 0, "rows, count: expected no negative numbers, got ", rows,
               " and ", count);
  constexpr int64_t kMost = int64_t{1} << 40;
  WINNOW_CHECK(rows <= kMost && count <= kMost && rows <= kMost / (count + 1),
               "rows, count: expected at most 2^40 numbers, got ", rows, " times ", count);
  const Tensor result = empty({rows, count}, ScalarType::Double, seed);
  const auto key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data_ptr()));
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
