// Every operator's schema: the table of contents of the library. Implementations register
// themselves, per device, in csrc/<family>/<op>.cpp and <op>.cu.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(winnow, m) {
  // attention

  // resampling
  m.def("effective_sample_size(Tensor log_weights) -> Tensor");

  // unmasking
  m.def(
      "logit_stats(Tensor logits, Tensor? mask, float temperature, Tensor? suppress_ids, "
      "Tensor? target_ids, Tensor? previous_logits, Tensor? unconditional_logits, float cfg_scale, "
      "int? top_k, float? top_p, Tensor? seed, bool raw) -> "
      "(Tensor token, Tensor log_prob, Tensor argmax, Tensor max_prob, Tensor margin, "
      "Tensor entropy, Tensor logsumexp, Tensor target_log_prob, Tensor kl)");
  m.def(
      "select_positions(Tensor score, Tensor mask, int order, int criterion, float threshold, "
      "int limit, Tensor? window, Tensor? at_least, Tensor? seed) -> (Tensor transfer, Tensor "
      "count)");

  // kvcache
}
