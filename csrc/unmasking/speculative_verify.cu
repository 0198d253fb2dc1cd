// winnow::speculative_verify on the GPU: three launches; lengths, order and seed stay on the
// device.
#include <optional>
#include <tuple>

#include "unmasking/speculative_verify.h"
#include "unmasking/speculative_verify_kernel.cuh"

namespace winnow {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> speculative_verify_cuda(
    const Tensor& draft_tokens, const std::optional<Tensor>& draft_logits,
    const Tensor& target_logits, double temperature, const std::optional<Tensor>& lengths,
    const std::optional<Tensor>& order, const std::optional<Tensor>& seed) {
  check_device("target_logits", target_logits);
  check_device("draft_tokens", draft_tokens);
  if (draft_logits) check_device("draft_logits", *draft_logits);
  if (lengths) check_device("lengths", *lengths);
  if (order) check_device("order", *order);
  const VerificationShape sizes = check_verification(draft_tokens, draft_logits, target_logits,
                                                     temperature, lengths, order, seed);

  const Stream stream(target_logits);
  const Rows target = as_rows(target_logits);
  const bool greedy = temperature == 0.0;
  std::optional<Rows> draft;
  if (draft_logits && !greedy) draft = as_rows(*draft_logits);
  const Tensor ids = dense(draft_tokens);
  std::optional<Tensor> dense_lengths;
  std::optional<Tensor> dense_order;
  if (lengths) dense_lengths = dense(*lengths);
  if (order) dense_order = dense(*order);

  Steps steps = {};
  steps.draft_tokens = global<const int64_t>(ids);
  if (dense_lengths) steps.lengths = global<const int64_t>(*dense_lengths);
  if (dense_order) steps.order = global<const int64_t>(*dense_order);
  steps.batch = sizes.batch;
  steps.steps = sizes.steps;
  steps.places = sizes.places;
  steps.drafts = sizes.drafts;
  steps.drafted = sizes.drafted;
  steps.draws_drafts = draft.has_value();
  steps.greedy = greedy;
  steps.temperature = greedy ? 1.0 : temperature;
  if (seed) steps.seed = seed_of(*seed);

  const Shape rows = {sizes.batch};
  const Shape all_steps = {sizes.batch, sizes.steps};
  const Tensor accepted = empty(rows, ScalarType::Long, target_logits);
  const Tensor token = empty(rows, ScalarType::Long, target_logits);
  const Tensor tokens = empty(all_steps, ScalarType::Long, target_logits);
  const Tensor log_prob = empty(all_steps, statistics_dtype(target_logits), target_logits);
  const int64_t slices = ceil_div<int64_t>(target.length, kSlice);
  const int64_t measured = sizes.batch * sizes.steps * (draft ? 2 : 1);
  const Tensor sums =
      empty({measured * slices, static_cast<int64_t>(sizeof(SliceSums) / sizeof(double))},
            ScalarType::Double, target_logits);
  const Tensor masses = empty({sizes.batch, slices}, ScalarType::Double, target_logits);
  dispatch_real(target_logits, [&](auto zero) {
    using Real = decltype(zero);
    const LogitView<Real> of_target = view_of<Real>(target);
    const Models<Real> models = {of_target, draft ? view_of<Real>(*draft) : of_target};
    const auto slice_sums = global<SliceSums>(sums);
    const auto residuals = global<double>(masses);
    const VerificationOutputs<Real> out = {global<int64_t>(accepted), global<int64_t>(token),
                                           global<int64_t>(tokens), global<Real>(log_prob)};
    launch("speculative_verify", measure_steps<Real>, Grid{measured, slices}, kThreads, stream,
           models, steps, slice_sums);
    if (!greedy) {
      launch("speculative_verify", sum_residuals<Real>, Grid{sizes.batch, slices}, kThreads, stream,
             models, steps, slice_sums, residuals);
    }
    launch("speculative_verify", finish_verification<Real>, Grid{sizes.batch}, kThreads, stream,
           models, steps, slice_sums, residuals, out);
  });
  return {accepted, token, tokens, log_prob};
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("speculative_verify", TORCH_BOX(&winnow::speculative_verify_cuda));
}
