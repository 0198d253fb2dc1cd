// winnow::block_diagonal_attention: local rows alone.
#pragma once

#include "attention/arguments.h"

namespace winnow {
namespace {

AttentionProblem block_problem(const Tensor& query, const Tensor& key, const Tensor& value,
                               int64_t block_size, bool causal, std::optional<double> scale) {
  check_key_value(query, key, value);
  check_at_least("block_size", block_size, 1);
  AttentionProblem problem = problem_of(query, key, value, scale);
  problem.pattern.chunk_size = bounded_chunk(block_size, query.size(2));
  problem.pattern.causal = causal;
  return problem;
}

std::tuple<Tensor, Tensor> block_diagonal_attention(const Tensor& query, const Tensor& key,
                                                    const Tensor& value, int64_t block_size,
                                                    bool causal, std::optional<double> scale) {
  return run_forward(block_problem(query, key, value, block_size, causal, scale),
                     {query, key, value, {}, {}, {}});
}

std::tuple<Tensor, Tensor, Tensor> block_diagonal_attention_backward(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& query, const Tensor& key,
    const Tensor& value, const Tensor& out, const Tensor& lse, int64_t block_size, bool causal,
    std::optional<double> scale) {
  const AttentionProblem problem = block_problem(query, key, value, block_size, causal, scale);
  InputGradients grads =
      run_backward(problem, {query, key, value, {}, {}, {}}, {grad_out, grad_lse, out, lse});
  return {grads.query, grads.key, grads.value};
}

}  // namespace
}  // namespace winnow
