// Every operator's schema: the table of contents of the library. Implementations register
// themselves, per device, in csrc/<family>/<op>.cpp and <op>.cu.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(winnow, m) {
  // attention

  // resampling
  m.def("effective_sample_size(Tensor log_weights) -> Tensor");

  // unmasking

  // kvcache
}
