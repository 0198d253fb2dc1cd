// Launches the forward of any attention pattern.
#include "attention/attention_call.h"
#include "attention/attention_forward_kernel.cuh"

namespace winnow {

std::tuple<Tensor, Tensor> run_forward(const AttentionProblem& problem, const Operands& operands) {
  const Tensor& query = operands.query;
  const Stream stream(query);
  Tensor out = empty(shape(query), query.scalar_type(), query);
  Tensor lse = empty(leading_shape(query), statistics_dtype(query), query);
  if (lse.numel() == 0) return {out, lse};
  dispatch_shape(problem, query, [&](auto zero, auto dim) {
    using T = decltype(zero);
    using Shape = ForwardShape<T, dim()>;
    const int64_t tiles = ceil_div<int64_t>(problem.pattern.rows, Shape::kRows);
    launch("attention_forward", attention_forward<T, dim()>,
           {tiles * problem.batch * problem.query_heads, 1, Shape::kSharedBytes}, Shape::kThreads,
           stream, call_of<T>(problem, operands), global<T>(out), global<Accumulator<T>>(lse));
  });
  return {out, lse};
}

}  // namespace winnow
