// winnow::chunk_attention on the CPU: tokens and slots as two sources, one softmax.
#include <torch/csrc/stable/library.h>

#include "attention/arguments.h"
#include "attention/run.h"

namespace winnow {
namespace {

struct Options {
  int64_t chunk_size, slots_per_chunk, initial_slots, lookback;
};

// Where each sequence's rows and slots begin, one entry more than sequences.
struct Sequences {
  std::vector<int64_t> row_begin, slot_begin;
};

Sequences read_sequences(const Tensor& cu_seqlens, const Tensor& query, int64_t slots,
                         const Options& options) {
  const ScalarType dtype = cu_seqlens.scalar_type();
  WINNOW_CHECK(dtype == ScalarType::Int || dtype == ScalarType::Long,
               "cu_seqlens: expected int32 or int64, got ", name_of(dtype));
  check_cpu("cu_seqlens", cu_seqlens);
  WINNOW_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 2,
               "cu_seqlens: expected (S + 1,) with at least one sequence, got shape ",
               shape_of(cu_seqlens));
  WINNOW_CHECK(query.size(0) == 1, "query: expected B = 1 with cu_seqlens, got ", shape_of(query));
  const int64_t rows = query.size(2);
  const int64_t count = cu_seqlens.size(0);
  const int64_t stride = cu_seqlens.stride(0);
  const void* data = cu_seqlens.data_ptr();
  const auto entry = [&](int64_t i) {
    return dtype == ScalarType::Int ? static_cast<const int32_t*>(data)[i * stride]
                                    : static_cast<const int64_t*>(data)[i * stride];
  };
  Sequences sequences{{0}, {0}};
  WINNOW_CHECK(entry(0) == 0, "cu_seqlens: expected to start at 0, got ", entry(0));
  for (int64_t i = 1; i < count; ++i) {
    const int64_t begin = sequences.row_begin.back();
    const int64_t end = entry(i);
    WINNOW_CHECK(end >= begin && end <= rows,
                 "cu_seqlens: expected ascending values up to N=", rows, ", got ", end, " after ",
                 begin, " at index ", i);
    // Each factor is at most the number of rows or was compared with the number of slots.
    const int64_t chunks = (end - begin + options.chunk_size - 1) / options.chunk_size;
    const int64_t seen = larger(chunks - 1, 0);
    WINNOW_CHECK(options.initial_slots <= slots && (seen == 0 || options.slots_per_chunk <= slots),
                 "slot_key: too few slots for cu_seqlens, got M=", slots);
    sequences.row_begin.push_back(end);
    sequences.slot_begin.push_back(sequences.slot_begin.back() + options.initial_slots +
                                   seen * options.slots_per_chunk);
    WINNOW_CHECK(sequences.slot_begin.back() <= slots, "slot_key: expected at least ",
                 sequences.slot_begin.back(), " slots for the sequences of cu_seqlens up to index ",
                 i, ", got M=", slots);
  }
  WINNOW_CHECK(sequences.row_begin.back() == rows, "cu_seqlens: expected to end at N=", rows,
               ", got ", sequences.row_begin.back());
  return sequences;
}

// `sequences` keeps what the pattern points to.
AttentionProblem chunk_problem(const Tensor& query, const Tensor& key, const Tensor& value,
                               const Tensor& slot_key, const Tensor& slot_value, Options options,
                               std::optional<double> scale, const std::optional<Tensor>& cu_seqlens,
                               Sequences* sequences) {
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

  AttentionProblem problem = problem_of(query, key, value, scale);
  Pattern& pattern = problem.pattern;
  pattern.slots = slot_key.size(2);
  options.chunk_size = bounded_chunk(options.chunk_size, pattern.rows);
  if (cu_seqlens) {
    *sequences = read_sequences(*cu_seqlens, query, pattern.slots, options);
    pattern.sequences = static_cast<int64_t>(sequences->row_begin.size()) - 1;
    pattern.row_begin = sequences->row_begin.data();
    pattern.slot_begin = sequences->slot_begin.data();
  }
  pattern.chunk_size = options.chunk_size;
  pattern.initial_slots = smaller(options.initial_slots, pattern.slots);
  pattern.slots_per_chunk = smaller(options.slots_per_chunk, pattern.slots);
  pattern.lookback = smaller(options.lookback, pattern.rows / options.chunk_size + 1);
  problem.slot_key = source_of(slot_key);
  problem.slot_value = source_of(slot_value);
  return problem;
}

std::tuple<Tensor, Tensor> chunk_attention(const Tensor& query, const Tensor& key,
                                           const Tensor& value, const Tensor& slot_key,
                                           const Tensor& slot_value, int64_t chunk_size,
                                           int64_t slots_per_chunk, int64_t initial_slots,
                                           int64_t lookback, std::optional<double> scale,
                                           const std::optional<Tensor>& cu_seqlens) {
  Sequences sequences;
  const AttentionProblem problem = chunk_problem(
      query, key, value, slot_key, slot_value,
      {chunk_size, slots_per_chunk, initial_slots, lookback}, scale, cu_seqlens, &sequences);
  return run_forward(problem, query);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> chunk_attention_backward(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& slot_key, const Tensor& slot_value, const Tensor& out,
    const Tensor& lse, int64_t chunk_size, int64_t slots_per_chunk, int64_t initial_slots,
    int64_t lookback, std::optional<double> scale, const std::optional<Tensor>& cu_seqlens) {
  Sequences sequences;
  const AttentionProblem problem = chunk_problem(
      query, key, value, slot_key, slot_value,
      {chunk_size, slots_per_chunk, initial_slots, lookback}, scale, cu_seqlens, &sequences);
  InputGradients grads =
      run_backward(problem, {grad_out, grad_lse, out, lse}, query, key, slot_key);
  return {grads.query, grads.key, grads.value, *grads.slot_key, *grads.slot_value};
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("chunk_attention", TORCH_BOX(&winnow::chunk_attention));
  m.impl("chunk_attention_backward", TORCH_BOX(&winnow::chunk_attention_backward));
}
