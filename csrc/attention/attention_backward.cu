// Launches the backward of any attention pattern.
#include "attention/attention_call.h"
#include "attention/key_gradients_kernel.cuh"

namespace winnow {
namespace {

// Blocks that fill any GPU, at least 256 query rows each. By shapes alone: sums are the same on
// every GPU.
int splits_of(int64_t rows, int64_t blocks) {
  const int64_t wanted = smaller(ceil_div<int64_t>(512, blocks), rows / 256);
  return static_cast<int>(larger(1, smaller(wanted, 16)));
}

template <typename T, int kDim>
void run(const AttentionProblem& problem, BackwardCall<T>& call, const Tensor& query,
         const Stream& stream) {
  using Shape = BackwardShape<T, kDim>;
  const Pattern& pattern = problem.pattern;
  const int64_t query_heads = problem.batch * problem.query_heads;
  const int64_t kv_heads = problem.batch * problem.kv_heads;
  const int64_t row_tiles = ceil_div<int64_t>(pattern.rows, Shape::kRows);
  const int64_t slot_tiles = ceil_div<int64_t>(pattern.slots, Shape::kRows);
  call.splits = splits_of(pattern.rows, larger(1, slot_tiles * kv_heads));
  const int parts = call.splits + (pattern.interleaved ? 1 : 0);
  const ScalarType wide = statistics_dtype(query);
  const Tensor log2_sums = empty({query_heads * pattern.rows}, wide, query);
  const Tensor deltas = empty({query_heads * pattern.rows}, wide, query);
  const Tensor sums = empty({parts, kv_heads, 2, pattern.slots, problem.dim}, wide, query);
  call.log2_sums = global<Accumulator<T>>(log2_sums);
  call.deltas = global<Accumulator<T>>(deltas);
  call.parts = global<Accumulator<T>>(sums);
  launch("row_terms", row_terms<T>,
         {ceil_div<int64_t>(query_heads * pattern.rows, kTermThreads / kWarp)}, kTermThreads,
         stream, call);
  launch("query_gradients", query_gradients<T, kDim>,
         {row_tiles * query_heads, 1, Shape::kSharedBytes}, Shape::kThreads, stream, call);
  launch("key_gradients", key_gradients<T, kDim>,
         {row_tiles * kv_heads, Shape::kTargets, Shape::kSharedBytes}, Shape::kThreads, stream,
         call, false, 1);
  launch("key_gradients", key_gradients<T, kDim>,
         {slot_tiles * kv_heads, call.splits * Shape::kTargets, Shape::kSharedBytes},
         Shape::kThreads, stream, call, true, call.splits);
  launch("slot_gradients", slot_gradients<T>,
         {ceil_div<int64_t>(kv_heads * 2 * pattern.slots * problem.dim, kSumThreads)}, kSumThreads,
         stream, call);
}

}  // namespace

InputGradients run_backward(const AttentionProblem& problem, const Operands& operands,
                            const Gradients& gradients) {
  const Tensor& query = operands.query;
  const Stream stream(query);
  const DenseGradients dense = dense_gradients(gradients, query);
  const InputGradients results = empty_gradients(operands);
  dispatch_shape(problem, query, [&](auto zero, auto dim) {
    using T = decltype(zero);
    using Acc = Accumulator<T>;
    BackwardCall<T> call = {};
    const Source grad_rows = source_of(dense.grad_out);
    call.forward = call_of<T>(problem, operands);
    call.forward.vectors = call.forward.vectors && in_pieces<T>(dense.grad_out, grad_rows);
    call.grad_out = rows_of<T>(dense.grad_out, grad_rows);
    call.out = global<const T>(dense.out);
    call.lse = global<const Acc>(dense.lse);
    call.grad_lse = global<const Acc>(dense.grad_lse);
    call.grad_query = global<T>(results.query);
    call.grad_key = global<T>(results.key);
    call.grad_value = global<T>(results.value);
    if (results.slot_key) {
      call.grad_slot_key = global<T>(*results.slot_key);
      call.grad_slot_value = global<T>(*results.slot_value);
    }
    run<T, dim()>(problem, call, query, stream);
  });
  return results;
}

}  // namespace winnow
