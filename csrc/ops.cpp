// Every operator's schema: the table of contents of the library. Implementations register
// themselves, per device, in csrc/<family>/<op>.cpp and <op>.cu.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(winnow, m) {
  // attention: sizes are SymInt, so that torch.compile does not specialise on them
  m.def(
      "cat_attention(Tensor query, Tensor key, Tensor value, SymInt block_size, float? scale)"
      " -> (Tensor out, Tensor lse)");
  m.def(
      "cat_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor query, Tensor key, "
      "Tensor value, Tensor out, Tensor lse, SymInt block_size, float? scale) -> (Tensor, Tensor, "
      "Tensor)");
  m.def(
      "chunk_attention(Tensor query, Tensor key, Tensor value, Tensor slot_key, Tensor slot_value, "
      "SymInt chunk_size, SymInt slots_per_chunk, SymInt initial_slots, SymInt lookback, "
      "float? scale, Tensor? cu_seqlens=None) -> (Tensor out, Tensor lse)");
  m.def(
      "chunk_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor query, Tensor key, "
      "Tensor value, Tensor slot_key, Tensor slot_value, Tensor out, Tensor lse, "
      "SymInt chunk_size, SymInt slots_per_chunk, SymInt initial_slots, SymInt lookback, "
      "float? scale, Tensor? cu_seqlens=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "block_diagonal_attention(Tensor query, Tensor key, Tensor value, SymInt block_size, "
      "bool causal, float? scale) -> (Tensor out, Tensor lse)");
  m.def(
      "block_diagonal_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor query, "
      "Tensor key, Tensor value, Tensor out, Tensor lse, SymInt block_size, bool causal, "
      "float? scale) -> (Tensor, Tensor, Tensor)");
  m.def("merge_attention(Tensor[] outs, Tensor[] lses) -> (Tensor out, Tensor lse)");
  m.def(
      "merge_attention_backward(Tensor grad_out, Tensor grad_lse, Tensor[] outs, Tensor[] lses, "
      "Tensor out, Tensor lse) -> (Tensor, Tensor)");

  // resampling
  m.def("effective_sample_size(Tensor log_weights) -> Tensor");
  m.def("log_mean_exp(Tensor log_weights) -> Tensor");
  m.def("weight_entropy(Tensor log_weights) -> Tensor");
  m.def("conditional_effective_sample_size(Tensor log_weights, Tensor log_increments) -> Tensor");
  m.def(
      "next_temperature(Tensor log_likelihood, Tensor beta, float target_ess, float max_beta, "
      "Tensor? log_weights) -> Tensor");
  m.def(
      "resample(Tensor log_weights, str scheme, int? num_samples, float? ess_threshold, "
      "bool keep_slots, Tensor? mask, Tensor? uniforms, Tensor? pinned, int seed, "
      "Tensor? seed_tensor) -> (Tensor ancestors, Tensor offspring, Tensor log_weights, "
      "Tensor log_z, Tensor ess, Tensor resampled, Tensor status)");
  m.def(
      "sample_without_replacement(Tensor log_weights, int k, str design, int seed, "
      "Tensor? seed_tensor) -> (Tensor indices, Tensor inclusion, Tensor weights)");
  m.def("inclusion_probabilities(Tensor log_weights, int k) -> Tensor");
  m.def("trace_ancestors(Tensor ancestors, Tensor indices) -> Tensor");
  m.def("uniforms(Tensor seed, SymInt rows, SymInt count) -> Tensor");
  m.def("gather_particles(Tensor state, Tensor ancestors, int dim) -> Tensor");
  m.def("gather_particles_(Tensor(a!) state, Tensor ancestors, int dim) -> ()");

  // unmasking
  m.def(
      "logit_stats(Tensor logits, Tensor? mask, float temperature, Tensor? suppress_ids, "
      "Tensor? target_ids, Tensor? previous_logits, Tensor? unconditional_logits, float cfg_scale, "
      "int? top_k, float? top_p, float? min_p, Tensor? seed, bool raw, SymInt? vocab_start=None, "
      "bool shift=False, Tensor? row_keys=None) -> (Tensor token, Tensor log_prob, Tensor argmax, "
      "Tensor max_prob, Tensor margin, Tensor entropy, Tensor logsumexp, Tensor target_log_prob, "
      "Tensor kl, Tensor part)");
  m.def(
      "merge_logit_stats(Tensor[] parts, SymInt[] starts, SymInt[] counts, float temperature, "
      "Tensor? seed, bool raw, bool has_target, bool has_previous, Tensor? row_keys=None)"
      " -> (Tensor token, Tensor log_prob, Tensor argmax, Tensor max_prob, Tensor margin, "
      "Tensor entropy, Tensor logsumexp, Tensor target_log_prob, Tensor kl)");
  m.def(
      "linear_logit_stats(Tensor hidden, Tensor weight, Tensor? bias, Tensor? mask, "
      "float temperature, Tensor? suppress_ids, Tensor? target_ids, Tensor? seed, bool raw, "
      "bool shift) -> (Tensor token, Tensor log_prob, Tensor argmax, Tensor max_prob, "
      "Tensor margin, Tensor entropy, Tensor logsumexp, Tensor target_log_prob, Tensor kl)");
  m.def(
      "unmask_step_(Tensor(a!) tokens, Tensor logits, int mask_id, Tensor? mask, Tensor? window, "
      "float temperature, Tensor? suppress_ids, Tensor? target_ids, Tensor? previous_logits, "
      "Tensor? unconditional_logits, float cfg_scale, int? top_k, float? top_p, float? min_p, "
      "Tensor? seed, bool raw, bool shift, int score, int order, int criterion, float threshold, "
      "int limit, Tensor? order_seed) -> (Tensor transfer, Tensor count, Tensor token, "
      "Tensor log_prob, Tensor argmax, Tensor max_prob, Tensor margin, Tensor entropy, "
      "Tensor logsumexp, Tensor target_log_prob, Tensor kl)");
  m.def(
      "select_positions(Tensor score, Tensor mask, int order, int criterion, float threshold, "
      "int limit, Tensor? window, Tensor? at_least, Tensor? seed) -> (Tensor transfer, "
      "Tensor count)");
  m.def(
      "soft_embedding(Tensor logits, Tensor embedding, Tensor mask_embedding, Tensor? mask, "
      "float temperature, int? top_k, float? top_p, float mix) -> Tensor");
  m.def(
      "speculative_verify(Tensor draft_tokens, Tensor? draft_logits, Tensor target_logits, "
      "float temperature, Tensor? lengths, Tensor? order, Tensor? seed) -> (Tensor accepted, "
      "Tensor token, Tensor tokens, Tensor log_prob)");

  // kvcache
  m.def(
      "paged_attention(Tensor query, Tensor key_pages, Tensor value_pages, Tensor block_table, "
      "Tensor seq_lens, bool causal=True, Tensor? block_indices=None, int? window=None, "
      "int sinks=0, Tensor? key_bias=None, float? scale=None, Tensor? key_scales=None, "
      "Tensor? value_scales=None) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_mass(Tensor query, Tensor key_pages, Tensor block_table, Tensor seq_lens, "
      "Tensor lse, bool causal=True, int? window=None, int sinks=0, Tensor? key_bias=None, "
      "float? scale=None) -> Tensor");
  m.def(
      "paged_write_(Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor key, Tensor value, "
      "Tensor block_table, Tensor positions) -> ()");
  m.def(
      "paged_quantise_(Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor(c!) key_scales, "
      "Tensor(d!) value_scales, Tensor key, Tensor value, Tensor block_table, Tensor positions)"
      " -> ()");
  m.def(
      "copy_blocks_(Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor source, Tensor target)"
      " -> ()");
  m.def("compact_pages_(Tensor(a!) pages, Tensor block_table, Tensor keep) -> ()");
  m.def(
      "block_summaries(Tensor key_pages, Tensor block_table, Tensor seq_lens, bool minmax=True, "
      "Tensor? key_scales=None) -> Tensor");
  m.def(
      "update_block_summaries_(Tensor(a!) summaries, Tensor key_pages, Tensor block_table, "
      "Tensor seq_lens, Tensor positions, Tensor? key_scales=None) -> ()");
  m.def("score_blocks(Tensor query, Tensor summaries, Tensor? block_table=None) -> Tensor");
  m.def(
      "select_blocks(Tensor scores, int k, Tensor seq_lens, int block_size, int sink_blocks=1, "
      "int recent_blocks=1) -> Tensor");
  m.def(
      "score_select_blocks(Tensor query, Tensor summaries, int k, Tensor seq_lens, int block_size, "
      "Tensor? block_table=None, int sink_blocks=1, int recent_blocks=1) -> Tensor");
}
