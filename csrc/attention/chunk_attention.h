// winnow::chunk_attention: tokens and slots as two sources, one softmax.
#pragma once

#include "attention/arguments.h"

namespace winnow {
namespace {

struct ChunkOptions {
  int64_t chunk_size, slots_per_chunk, initial_slots, lookback;
};

struct ChunkCall {
  AttentionProblem problem;
  Operands operands;
};

ChunkCall chunk_call(const Tensor& query, const Tensor& key, const Tensor& value,
                     const Tensor& slot_key, const Tensor& slot_value, const ChunkOptions& options,
                     std::optional<double> scale, const std::optional<Tensor>& cu_seqlens) {
  check_key_value(query, key, value);
  check_source("slot_key", slot_key, query, "(B, Hkv, M, D)");
  check_source("slot_value", slot_value, query, "(B, Hkv, M, D)");
  check_same_shape("slot_value", slot_value, "slot_key", slot_key);
  WINNOW_CHECK(slot_key.size(1) == key.size(1), "slot_key: expected Hkv=", key.size(1),
               " heads as in key, got ", shape_of(slot_key));
  check_at_least("chunk_size", options.chunk_size, 1);
  check_at_least("slots_per_chunk", options.slots_per_chunk, 1);
  check_at_least("initial_slots", options.initial_slots, 0);
  check_at_least("lookback", options.lookback, 0);

  ChunkCall call{problem_of(query, key, value, scale),
                 {query, key, value, slot_key, slot_value, std::nullopt}};
  Pattern& pattern = call.problem.pattern;
  pattern.slots = slot_key.size(2);
  pattern.chunk_size = bounded_chunk(options.chunk_size, pattern.rows);
  pattern.initial_slots = options.initial_slots;
  pattern.slots_per_chunk = options.slots_per_chunk;
  if (cu_seqlens) {
    const ScalarType dtype = cu_seqlens->scalar_type();
    WINNOW_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long,
                 "cu_seqlens: expected int32 or int64, got ", name_of(dtype));
    check_operand_device("cu_seqlens", *cu_seqlens);
    WINNOW_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 2,
                 "cu_seqlens: expected (S + 1,) with at least one sequence, got shape ",
                 shape_of(*cu_seqlens));
    WINNOW_CHECK(query.size(0) == 1, "query: expected B = 1 with cu_seqlens, got ",
                 shape_of(query));
    call.operands.sequences = read_sequences(*cu_seqlens, pattern);
    pattern.sequences = cu_seqlens->size(0) - 1;
    pattern.row_begin = static_cast<const int64_t*>(call.operands.sequences->data_ptr());
    pattern.slot_begin = pattern.row_begin + pattern.sequences + 1;
  }
  pattern.initial_slots = smaller(pattern.initial_slots, pattern.slots);
  pattern.slots_per_chunk = smaller(pattern.slots_per_chunk, pattern.slots);
  pattern.lookback = smaller(options.lookback, pattern.rows / pattern.chunk_size + 1);
  call.problem.slot_key = source_of(slot_key);
  call.problem.slot_value = source_of(slot_value);
  return call;
}

std::tuple<Tensor, Tensor> chunk_attention(const Tensor& query, const Tensor& key,
                                           const Tensor& value, const Tensor& slot_key,
                                           const Tensor& slot_value, int64_t chunk_size,
                                           int64_t slots_per_chunk, int64_t initial_slots,
                                           int64_t lookback, std::optional<double> scale,
                                           const std::optional<Tensor>& cu_seqlens) {
  const ChunkCall call =
      chunk_call(query, key, value, slot_key, slot_value,
                 {chunk_size, slots_per_chunk, initial_slots, lookback}, scale, cu_seqlens);
  return run_forward(call.problem, call.operands);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> chunk_attention_backward(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& slot_key, const Tensor& slot_value, const Tensor& out,
    const Tensor& lse, int64_t chunk_size, int64_t slots_per_chunk, int64_t initial_slots,
    int64_t lookback, std::optional<double> scale, const std::optional<Tensor>& cu_seqlens) {
  const ChunkCall call =
      chunk_call(query, key, value, slot_key, slot_value,
                 {chunk_size, slots_per_chunk, initial_slots, lookback}, scale, cu_seqlens);
  InputGradients grads = run_backward(call.problem, call.operands, {grad_out, grad_lse, out, lse});
  return {grads.query, grads.key, grads.value, *grads.slot_key, *grads.slot_value};
}

}  // namespace
}  // namespace winnow
