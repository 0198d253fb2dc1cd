// winnow::unmask_step_ on the GPU in three launches: slices of the masked positions, their
// statistics and tokens, and the choice, which writes. One more with top-k or top-p, three more for
// the divergence. Which positions are masked is read where it is needed. And the choice alone,
// winnow::select_positions, in this unit too.
#include <optional>
#include <tuple>

#include "unmasking/measure_rows.cuh"
#include "unmasking/selection_arguments.h"
#include "unmasking/selection_kernel.cuh"
#include "unmasking/step_arguments.h"

namespace winnow {
namespace {

// The statistics that were just measured.
template <typename Real>
struct MeasuredScores {
  using Score = Real;
  MaskedTokens tokens;
  Global<const bool> mask;  // or null
  RowOutputs<Real> stats;
  StepScore kind;

  WINNOW_DEVICE bool masked(int64_t at) const {
    if (mask) {
      const bool allowed = mask[at];
      if (!allowed) return false;
    }
    return tokens.contains(at);
  }
  WINNOW_DEVICE double score(int64_t at) const {
    Real value = Real(0);
    if (kind == kMargin) {
      value = stats.margin[at];
    } else if (kind == kConfidence) {
      const int64_t token = stats.token[at];
      const int64_t argmax = stats.argmax[at];
      const Real log_prob = stats.log_prob[at];
      // max_prob is exact where the two agree: e.g. one half, which a threshold may name.
      value = exp(log_prob);
      if (token == argmax) value = stats.max_prob[at];
    } else {
      value = stats.entropy[at];
    }
    return static_cast<double>(value);
  }
  WINNOW_DEVICE bool take(int64_t at) const {
    const int64_t token = stats.token[at];
    if (token < 0) return false;  // nothing to write where all logits are NaN
    tokens.write(at, token);
    return true;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
unmask_step_cuda(Tensor tokens, const Tensor& logits, int64_t mask_id,
                 const std::optional<Tensor>& mask, const std::optional<Tensor>& window,
                 double temperature, const std::optional<Tensor>& suppress_ids,
                 const std::optional<Tensor>& target_ids,
                 const std::optional<Tensor>& previous_logits,
                 const std::optional<Tensor>& unconditional_logits, double cfg_scale,
                 std::optional<int64_t> top_k, std::optional<double> top_p,
                 std::optional<double> min_p, const std::optional<Tensor>& seed, bool raw,
                 bool shift, int64_t score, int64_t order, int64_t criterion, double threshold,
                 int64_t limit, const std::optional<Tensor>& order_seed) {
  const StepArguments call = check_step(tokens, logits, mask, window, check_device);
  const LogitArguments arguments =
      check_logit_arguments({logits, call.mask, temperature, suppress_ids, target_ids,
                             previous_logits, unconditional_logits, cfg_scale, top_k, top_p, min_p,
                             seed, raw, std::nullopt, shift, std::nullopt},
                            check_device);
  const Stream stream(logits);
  MaskedTokens masked = {};
  if (tokens.scalar_type() == ScalarType::Int) {
    masked.narrow = global<int32_t>(tokens);
  } else {
    masked.wide = global<int64_t>(tokens);
  }
  masked.stride = tokens.stride(0);
  masked.step = tokens.stride(1);
  masked.length = call.length;
  masked.mask_id = mask_id;
  if (call.window) masked.window = global<const int64_t>(*call.window);

  const LogitOutputs out(logits, target_ids.has_value(), previous_logits.has_value());
  const Tensor transfer = empty(shape(tokens), ScalarType::Bool, tokens);
  const Tensor count = empty({call.batch}, ScalarType::Long, tokens);
  const Tensor rank = empty({2, call.batch, call.length}, ScalarType::Long, tokens);
  measure_rows(arguments, masked, seed, logits, out, stream);

  Selection selection = {};
  selection.window = masked.window;
  if (order_seed) selection.seed = seed_of(*order_seed);
  selection.rule = make_rule(order, criterion, threshold, limit);
  selection.length = call.length;
  selection.rank = global<int64_t>(rank);
  selection.leftmost = global<int64_t>(rank) + call.batch * call.length;
  selection.transfer = global<bool>(transfer);
  selection.count = global<int64_t>(count);
  dispatch_real(logits, [&](auto zero) {
    using Real = decltype(zero);
    MeasuredScores<Real> source = {};
    source.tokens = masked;
    if (call.mask) source.mask = global<const bool>(*call.mask);
    source.stats = out.pointers<Real>();
    source.kind = make_score(score);
    launch("unmask_step_", select_rows<MeasuredScores<Real>>, {call.batch}, kChoosers, stream,
           source, selection);
  });
  return std::tuple_cat(std::make_tuple(transfer, count), out.tensors());
}

std::tuple<Tensor, Tensor> select_positions_cuda(const Tensor& score, const Tensor& mask,
                                                 int64_t order, int64_t criterion, double threshold,
                                                 int64_t limit, const std::optional<Tensor>& window,
                                                 const std::optional<Tensor>& at_least,
                                                 const std::optional<Tensor>& seed) {
  const SelectionArguments checked = check_selection(score, mask, window, at_least, check_device);
  const int64_t batch = score.size(0);
  const int64_t length = score.size(1);
  const Stream stream(score);
  const Tensor transfer = empty({batch, length}, ScalarType::Bool, score);
  const Tensor count = empty({batch}, ScalarType::Long, score);
  const Tensor rank = empty({2, batch, length}, ScalarType::Long, score);

  Selection call = {};
  if (checked.window) call.window = global<const int64_t>(*checked.window);
  if (checked.at_least) call.at_least = global<const int64_t>(*checked.at_least);
  if (seed) call.seed = seed_of(*seed);
  call.rule = make_rule(order, criterion, threshold, limit);
  call.length = length;
  call.rank = global<int64_t>(rank);
  call.leftmost = global<int64_t>(rank) + batch * length;
  call.transfer = global<bool>(transfer);
  call.count = global<int64_t>(count);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const GivenScores<T> source = {global<const T>(checked.score),
                                   global<const bool>(checked.mask)};
    launch("select_positions", select_rows<GivenScores<T>>, {batch}, kChoosers, stream, source,
           call);
  };
  if (score.scalar_type() == ScalarType::Double) {
    run(double{});
  } else {
    run(float{});
  }
  return {transfer, count};
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("unmask_step_", TORCH_BOX(&winnow::unmask_step_cuda));
  m.impl("select_positions", TORCH_BOX(&winnow::select_positions_cuda));
}
