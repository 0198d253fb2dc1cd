// winnow::unmask_step_ on the CPU: measures the masked positions, chooses among them and writes.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "unmasking/logit_outputs.h"
#include "unmasking/logit_stats.h"
#include "unmasking/selection.h"
#include "unmasking/selection_arguments.h"
#include "unmasking/step_arguments.h"

namespace winnow {
namespace {

// The masked positions that may be unmasked.
Tensor candidates(const StepArguments& call, const std::optional<Tensor>& mask, int64_t mask_id) {
  const Tensor result = empty({call.batch, call.length}, ScalarType::Bool, call.tokens);
  auto* out = static_cast<bool*>(result.data_ptr());
  const bool* allowed = mask ? static_cast<const bool*>(mask->data_ptr()) : nullptr;
  for (int64_t b = 0; b < call.batch; ++b) {
    const auto [start, end] = call.bounds(b);
    for (int64_t l = 0; l < call.length; ++l) {
      const int64_t at = b * call.length + l;
      out[at] = l >= start && l < end && call.token(b, l) == mask_id &&
                (allowed == nullptr || allowed[at]);
    }
  }
  return result;
}

// In the dtype that the statistics are returned in, as select_positions would get it.
template <typename T>
T score_of(const RowStats& stats, StepScore score) {
  switch (score) {
    case kMargin:
      return static_cast<T>(stats.margin);
    case kConfidence:
      // max_prob is exact where the two agree: e.g. one half, which a threshold may name.
      return static_cast<T>(stats.token == stats.argmax ? stats.max_prob
                                                        : std::exp(stats.log_prob));
    default:
      return static_cast<T>(stats.entropy);
  }
}

template <typename T>
void choose(const StepArguments& call, const bool* masked, const LogitProblem& problem,
            const std::vector<RowStats>& stats, StepScore score, const Rule& rule,
            const uint64_t* seed, bool* transfer, int64_t* counts) {
  std::vector<T> scores(static_cast<size_t>(call.batch * call.length));
  std::vector<int64_t> drawn(scores.size(), -1);
  for (size_t a = 0; a < stats.size(); ++a) {
    const auto at = static_cast<size_t>(problem.active[a]);
    scores[at] = score_of<T>(stats[a], score);
    drawn[at] = stats[a].token;
  }
  std::vector<Candidate> candidates;
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t row = b * call.length;
    const auto [start, end] = call.bounds(b);
    bool* chosen = transfer + row;
    std::fill(chosen, chosen + call.length, false);
    select_row(scores.data() + row, masked + row, start, end, rule, 1, seed, b, candidates, chosen);
    counts[b] = 0;
    for (int64_t l = start; l < end; ++l) {
      const int64_t token = drawn[static_cast<size_t>(row + l)];
      chosen[l] = chosen[l] && token >= 0;  // nothing to write where all logits are NaN
      if (!chosen[l]) continue;
      call.write(b, l, token);
      ++counts[b];
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
unmask_step(Tensor tokens, const Tensor& logits, int64_t mask_id, const std::optional<Tensor>& mask,
            const std::optional<Tensor>& window, double temperature,
            const std::optional<Tensor>& suppress_ids, const std::optional<Tensor>& target_ids,
            const std::optional<Tensor>& previous_logits,
            const std::optional<Tensor>& unconditional_logits, double cfg_scale,
            std::optional<int64_t> top_k, std::optional<double> top_p, std::optional<double> min_p,
            const std::optional<Tensor>& seed, bool raw, bool shift, int64_t score, int64_t order,
            int64_t criterion, double threshold, int64_t limit,
            const std::optional<Tensor>& order_seed) {
  const StepArguments call = check_step(tokens, logits, mask, window, check_cpu);
  const Tensor masked = candidates(call, call.mask, mask_id);
  const std::optional<Tensor> rows = masked;
  LogitProblem problem;
  prepare(
      {logits, rows, temperature, suppress_ids, target_ids, previous_logits, unconditional_logits,
       cfg_scale, top_k, top_p, min_p, seed, raw, std::nullopt, shift, std::nullopt},
      problem, mask_id);
  const uint64_t lots = order_seed ? seed_on_cpu(*order_seed) : 0;

  const Outputs out(shape(tokens), logits, target_ids.has_value(), previous_logits.has_value());
  const Tensor transfer = empty(shape(tokens), ScalarType::Bool, tokens);
  const Tensor count = empty({call.batch}, ScalarType::Long, tokens);
  list_rows(problem);
  const std::vector<RowStats> stats = measure_rows(problem);
  out.put(problem, stats);
  const auto run = [&](auto zero) {
    choose<decltype(zero)>(call, static_cast<const bool*>(masked.data_ptr()), problem, stats,
                           make_score(score), make_rule(order, criterion, threshold, limit),
                           order_seed ? &lots : nullptr, static_cast<bool*>(transfer.data_ptr()),
                           static_cast<int64_t*>(count.data_ptr()));
  };
  if (logits.scalar_type() == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
  return std::tuple_cat(std::make_tuple(transfer, count), out.tensors());
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("unmask_step_", TORCH_BOX(&winnow::unmask_step));
}
