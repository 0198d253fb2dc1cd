// Every operator's schema: the table of contents of the library. Implementations register
// themselves, per device, in csrc/<family>/<op>.cpp and <op>.cu.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(winnow, m) {
  // attention

  // resampling
  m.def("effective_sample_size(Tensor log_weights) -> Tensor");
  m.def(
      "resample(Tensor log_weights, str scheme, int? num_samples, float? ess_threshold, "
      "bool keep_slots, Tensor? mask, Tensor? uniforms, int seed, Tensor? seed_tensor) -> "
      "(Tensor ancestors, Tensor offspring, Tensor log_weights, Tensor log_z, Tensor ess, "
      "Tensor resampled, Tensor status)");
  m.def("gather_particles(Tensor state, Tensor ancestors, int dim) -> Tensor");
  m.def("gather_particles_(Tensor(a!) state, Tensor ancestors, int dim) -> ()");

  // unmasking

  // kvcache
}
