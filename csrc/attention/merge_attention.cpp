// winnow::merge_attention on the CPU: rows of the partial results, spread over threads.
#include "attention/merge_attention_simd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "attention/merge_arguments.h"
#include "common/parallel.h"

namespace winnow {
namespace {

// A tensor's rows kept alive next to the plain description of them.
struct Operand {
  Rows out;
  Rows lse;
  MergeRows rows;
};

// lse is a column: rows of one element.
Rows as_column(const Tensor& lse) {
  return as_rows(torch::stable::unsqueeze(lse, -1));
}

Operand operand_of(const Tensor& out, const Tensor& lse) {
  Operand operand{as_rows(out), as_column(lse), {}};
  operand.rows = {operand.out.tensor.data_ptr(), operand.lse.tensor.data_ptr(), operand.out.stride,
                  operand.lse.stride};
  return operand;
}

template <typename Loop>
void over_rows(const MergeProblem& problem, int64_t rows, Loop loop) {
  const int64_t grain = 1 + 32768 / (problem.parts * problem.dim + 1);
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { loop(problem, begin, end); });
}

std::tuple<Tensor, Tensor> merge_attention(const std::vector<Tensor>& outs,
                                           const std::vector<Tensor>& lses) {
  check_parts(outs, lses);
  Tensor out = empty(shape(outs[0]), outs[0].scalar_type(), outs[0]);
  Tensor lse = empty(leading_shape(outs[0]), statistics_dtype(outs[0]), outs[0]);
  std::vector<Operand> operands;
  std::vector<MergeRows> parts;
  for (size_t i = 0; i < outs.size(); ++i) {
    operands.push_back(operand_of(outs[i], lses[i]));
    parts.push_back(operands.back().rows);
  }
  MergeProblem problem;
  problem.type = element_type(outs[0]);
  problem.dim = out.size(out.dim() - 1);
  problem.parts = static_cast<int64_t>(parts.size());
  problem.part = parts.data();
  problem.merged = {out.data_ptr(), lse.data_ptr(), problem.dim, 1};
  over_rows(problem, product(shape(lse)), WINNOW_SIMD(merge_attention_rows));
  return {out, lse};
}

// Gradients stacked along a new first dimension: (P, ..., N, D) and (P, ..., N).
std::tuple<Tensor, Tensor> merge_attention_backward(const Tensor& grad_out, const Tensor& grad_lse,
                                                    const std::vector<Tensor>& outs,
                                                    const std::vector<Tensor>& lses,
                                                    const Tensor& out, const Tensor& lse) {
  check_parts(outs, lses);
  check_merged(grad_out, grad_lse, outs, lses, out, lse);
  const int64_t rows = product(shape(lse));
  const int64_t dim = out.size(out.dim() - 1);
  const Tensor grad_outs = stacked(out, outs.size());
  const Tensor grad_lses = stacked(lse, outs.size());

  std::vector<Operand> operands;
  std::vector<MergeRows> parts;
  std::vector<MergeRows> part_grads;
  for (size_t i = 0; i < outs.size(); ++i) {
    operands.push_back(operand_of(outs[i], lses[i]));
    parts.push_back(operands.back().rows);
    const auto offset = static_cast<int64_t>(i) * rows;
    part_grads.push_back({static_cast<char*>(grad_outs.data_ptr()) +
                              offset * dim * static_cast<int64_t>(grad_outs.element_size()),
                          static_cast<char*>(grad_lses.data_ptr()) +
                              offset * static_cast<int64_t>(grad_lses.element_size()),
                          dim, 1});
  }
  const Operand merged = operand_of(out, lse);
  const Operand grad = operand_of(grad_out, grad_lse);
  MergeProblem problem;
  problem.type = element_type(out);
  problem.dim = dim;
  problem.parts = static_cast<int64_t>(parts.size());
  problem.part = parts.data();
  problem.merged = merged.rows;
  problem.grad = grad.rows;
  problem.part_grad = part_grads.data();
  over_rows(problem, rows, WINNOW_SIMD(merge_attention_backward_rows));
  return {grad_outs, grad_lses};
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("merge_attention", TORCH_BOX(&winnow::merge_attention));
  m.impl("merge_attention_backward", TORCH_BOX(&winnow::merge_attention_backward));
}
