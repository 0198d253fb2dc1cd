// winnow::cat_attention: the interleaved layout, whose vector rows are the slots.
#pragma once

#include "attention/arguments.h"

namespace winnow {
namespace {

AttentionProblem cat_problem(const Tensor& query, const Tensor& key, const Tensor& value,
                             int64_t block_size, std::optional<double> scale) {
  check_key_value(query, key, value);
  check_at_least("block_size", block_size, 1);
  AttentionProblem problem = problem_of(query, key, value, scale);
  problem.pattern.chunk_size = bounded_chunk(block_size, query.size(2));
  use_rows_as_slots(&problem);
  return problem;
}

std::tuple<Tensor, Tensor> cat_attention(const Tensor& query, const Tensor& key,
                                         const Tensor& value, int64_t block_size,
                                         std::optional<double> scale) {
  return run_forward(cat_problem(query, key, value, block_size, scale),
                     {query, key, value, {}, {}, {}});
}

std::tuple<Tensor, Tensor, Tensor> cat_attention_backward(const Tensor& grad_out,
                                                          const Tensor& grad_lse,
                                                          const Tensor& query, const Tensor& key,
                                                          const Tensor& value, const Tensor& out,
                                                          const Tensor& lse, int64_t block_size,
                                                          std::optional<double> scale) {
  const AttentionProblem problem = cat_problem(query, key, value, block_size, scale);
  InputGradients grads =
      run_backward(problem, {query, key, value, {}, {}, {}}, {grad_out, grad_lse, out, lse});
  return {grads.query, grads.key, grads.value};
}

}  // namespace
}  // namespace winnow
