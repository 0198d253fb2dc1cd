// Every operator's schema: the table of contents of the library. Implementations register
// themselves, per device, in csrc/<family>/<op>.cpp and <op>.cu.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(winnow, m) {
  // attention
  m.def(
      "cat_attention(Tensor query, Tensor key, Tensor value, int block_size, float? scale)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "cat_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor query, Tensor key,"
      " Tensor value, Tensor out, Tensor lse, int block_size, float? scale)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "chunk_attention(Tensor query, Tensor key, Tensor value, Tensor slot_key, Tensor slot_value,"
      " int chunk_size, int slots_per_chunk, int initial_slots, int lookback, float? scale,"
      " Tensor? cu_seqlens=None) -> (Tensor out, Tensor lse)");
  m.def(
      "chunk_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor query, Tensor key,"
      " Tensor value, Tensor slot_key, Tensor slot_value, Tensor out, Tensor lse, int chunk_size,"
      " int slots_per_chunk, int initial_slots, int lookback, float? scale, Tensor? cu_seqlens=None)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "block_diagonal_attention(Tensor query, Tensor key, Tensor value, int block_size, bool causal,"
      " float? scale) -> (Tensor out, Tensor lse)");
  m.def(
      "block_diagonal_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor query, Tensor key,"
      " Tensor value, Tensor out, Tensor lse, int block_size, bool causal, float? scale)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("merge_attention(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)");
  m.def(
      "merge_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor[] outs, Tensor[] lses,"
      " Tensor out, Tensor lse) -> (Tensor, Tensor)");

  // resampling
  m.def("effective_sample_size(Tensor log_weights) -> Tensor");

  // unmasking

  // kvcache
}
