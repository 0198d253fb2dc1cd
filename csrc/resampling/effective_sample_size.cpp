// winnow::effective_sample_size on the CPU: one population per row, rows spread over threads.
#include "resampling/effective_sample_size_simd.h"

#include <torch/csrc/stable/library.h>

#include "resampling/populations.h"

namespace winnow {
namespace {

Tensor effective_sample_size(const Tensor& log_weights) {
  return statistic_of_rows(log_weights, WINNOW_SIMD(effective_sample_size_rows));
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("effective_sample_size", TORCH_BOX(&winnow::effective_sample_size));
}
