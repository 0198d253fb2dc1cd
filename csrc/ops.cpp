// Every operator's schema: the table of contents of the library. Implementations register
// themselves, per device, in csrc/<family>/<op>.cpp and <op>.cu.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(winnow, m) {
  // attention

  // resampling
  m.def("effective_sample_size(Tensor log_weights) -> Tensor");

  // unmasking

  // kvcache
  m.def(
      "paged_attention(Tensor query, Tensor key_pages, Tensor value_pages, Tensor block_table, "
      "Tensor seq_lens, bool causal=True, Tensor? block_indices=None, int? window=None, "
      "int sinks=0, Tensor? key_bias=None, float? scale=None) -> (Tensor out, Tensor lse)");
  m.def(
      "paged_write_(Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor key, Tensor value, "
      "Tensor block_table, Tensor positions) -> ()");
  m.def(
      "copy_blocks_(Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor source, Tensor target) "
      "-> ()");
  m.def(
      "block_summaries(Tensor key_pages, Tensor block_table, Tensor seq_lens, bool minmax=True) "
      "-> Tensor");
  m.def("score_blocks(Tensor query, Tensor summaries) -> Tensor");
  m.def(
      "select_blocks(Tensor scores, int k, Tensor seq_lens, int block_size, int sink_blocks=1, "
      "int recent_blocks=1) -> Tensor");
}
