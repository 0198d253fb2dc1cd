// What the kernels over a block table share. Lengths and blocks stay on the device and are not
// checked: what lies outside of the pages counts as no tokens.
#pragma once

#include "common/device.h"

namespace winnow {
namespace {

WINNOW_DEVICE int64_t length_of(Global<const int32_t> seq_lens, int64_t row, int64_t most) {
  const int64_t length = static_cast<int32_t>(seq_lens[row]);
  return length < 0 ? 0 : length > most ? most : length;
}

// ---- for launchers ----

[[maybe_unused]] inline void check_integers(const char* name, const Tensor& tensor) {
  check_device(name, tensor);
  check_dtype(name, tensor, ScalarType::Int);
  check_last_contiguous(name, tensor);
}

[[maybe_unused]] inline void check_lengths(const Tensor& seq_lens, int64_t batch,
                                           const char* holder) {
  check_integers("seq_lens", seq_lens);
  WINNOW_CHECK(seq_lens.dim() == 1 && seq_lens.size(0) == batch,
               "seq_lens: expected (B,) with B=", batch, " as in ", holder, ", got ",
               shape_of(seq_lens));
}

}  // namespace
}  // namespace winnow
