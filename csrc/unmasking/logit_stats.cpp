// winnow::logit_stats on the CPU.
#include "unmasking/logit_stats.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "unmasking/logit_outputs.h"

namespace winnow {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
logit_stats(const Tensor& logits, const std::optional<Tensor>& mask, double temperature,
            const std::optional<Tensor>& suppress_ids, const std::optional<Tensor>& target_ids,
            const std::optional<Tensor>& previous_logits,
            const std::optional<Tensor>& unconditional_logits, double cfg_scale,
            std::optional<int64_t> top_k, std::optional<double> top_p, std::optional<double> min_p,
            const std::optional<Tensor>& seed, bool raw, std::optional<int64_t> vocab_start,
            bool shift, const std::optional<Tensor>& row_keys) {
  LogitProblem problem;
  prepare(
      {logits, mask, temperature, suppress_ids, target_ids, previous_logits, unconditional_logits,
       cfg_scale, top_k, top_p, min_p, seed, raw, vocab_start, shift, row_keys},
      problem);
  const Outputs out(leading_shape(logits), logits, target_ids.has_value(),
                    previous_logits.has_value());
  list_rows(problem);
  Shape part_shape = {0};
  if (vocab_start) {
    part_shape = leading_shape(logits);
    part_shape.push_back(part_words(problem));
  }
  Tensor part = empty(part_shape, statistics_dtype(logits), logits);
  const bool skips = problem.active.size() < static_cast<size_t>(problem.arguments.rows.count);
  if (vocab_start && skips) torch::stable::zero_(part);
  out.put(problem, measure_rows(problem, vocab_start ? part.data_ptr() : nullptr));
  return std::tuple_cat(out.tensors(), std::make_tuple(part));
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("logit_stats", TORCH_BOX(&winnow::logit_stats));
}
