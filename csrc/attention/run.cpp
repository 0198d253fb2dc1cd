// Allocation and threads of the attention operators: one parallel region forward, two backward.
#include "attention/run.h"

#include <memory>

#include "attention/arguments.h"
#include "attention/attention_backward_simd.h"
#include "attention/attention_forward_simd.h"
#include "common/parallel.h"

namespace winnow {
namespace {

// Memory that a loop of one thread works in, not initialised.
std::unique_ptr<char[]> scratch_memory(int64_t bytes) {
  return std::unique_ptr<char[]>(new char[static_cast<size_t>(bytes)]);
}

// Units per thread at least: a thread is worth waking for about 20 µs, 10^6 multiply-adds.
int64_t grain_of(const AttentionProblem& problem, int64_t rows_per_unit) {
  const Pattern& pattern = problem.pattern;
  const int64_t keys = pattern.slots / 2 + pattern.chunk_size * (1 + pattern.lookback);
  const int64_t per_row = 2 * problem.dim * (keys < pattern.rows ? keys : pattern.rows) + 1;
  return 1 + 1'000'000 / (per_row * rows_per_unit + 1);
}

// Enough splits that batch, heads and splits occupy a large machine, of at least 256 rows each.
int64_t splits_of(const AttentionProblem& problem) {
  const int64_t heads = problem.batch * problem.kv_heads;
  const int64_t wanted = heads > 0 ? 64 / heads : 1;
  const int64_t by_rows = problem.pattern.rows / 256;
  const int64_t splits = wanted < by_rows ? wanted : by_rows;
  return splits < 1 ? 1 : splits > 8 ? 8 : splits;
}

}  // namespace

void check_operand_device(const char* argument, const Tensor& tensor) {
  check_cpu(argument, tensor);
}

std::tuple<Tensor, Tensor> run_forward(const AttentionProblem& problem, const Operands& operands) {
  const Tensor& query = operands.query;
  Tensor out = empty(shape(query), query.scalar_type(), query);
  Tensor lse = empty(leading_shape(query), statistics_dtype(query), query);
  void* out_data = out.data_ptr();
  void* lse_data = lse.data_ptr();
  const auto loop = WINNOW_SIMD(attention_forward);
  parallel_for(0, forward_units(problem), grain_of(problem, task_rows(problem.pattern)),
               [&](int64_t begin, int64_t end) {
                 const auto memory = scratch_memory(forward_scratch_bytes(problem.dim));
                 loop(problem, begin, end, memory.get(), out_data, lse_data);
               });
  return {out, lse};
}

InputGradients run_backward(const AttentionProblem& problem, const Operands& operands,
                            const Gradients& gradients) {
  const DenseGradients dense = dense_gradients(gradients, operands.query);
  const InputGradients results = empty_gradients(operands);

  BackwardProblem backward;
  backward.forward = problem;
  backward.splits = splits_of(problem);
  backward.out = dense.out.data_ptr();
  backward.lse = dense.lse.data_ptr();
  backward.grad_lse = dense.grad_lse.data_ptr();
  backward.grad_out = source_of(dense.grad_out);
  backward.grad_query = results.query.data_ptr();
  backward.grad_key = results.key.data_ptr();
  backward.grad_value = results.value.data_ptr();
  if (results.slot_key) {
    backward.grad_slot_key = results.slot_key->data_ptr();
    backward.grad_slot_value = results.slot_value->data_ptr();
  }
  const int64_t heads = problem.batch * problem.kv_heads;
  const Tensor slot_sums =
      empty({heads, backward.splits, 2, problem.pattern.slots, padded_dim(problem.dim)},
            statistics_dtype(operands.query), operands.query);
  backward.slot_sums = slot_sums.data_ptr();

  const auto loop = WINNOW_SIMD(attention_backward);
  const int64_t rows_per_unit = problem.pattern.rows / backward.splits + 1;
  parallel_for(0, backward_units(backward), grain_of(problem, rows_per_unit),
               [&](int64_t begin, int64_t end) {
                 const auto memory = scratch_memory(backward_scratch_bytes(problem));
                 loop(backward, begin, end, memory.get());
               });
  if (problem.pattern.slots > 0) {
    const auto slots_loop = WINNOW_SIMD(slot_gradients);
    const int64_t per_head = backward.splits * problem.pattern.slots * problem.dim;
    parallel_for(0, heads, 1 + 100'000 / (per_head + 1),
                 [&](int64_t begin, int64_t end) { slots_loop(backward, begin, end); });
  }
  return results;
}

}  // namespace winnow
