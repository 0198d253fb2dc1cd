// winnow::logit_stats on the GPU.
#include <optional>
#include <tuple>

#include "unmasking/measure_rows.cuh"

namespace winnow {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
logit_stats_cuda(const Tensor& logits, const std::optional<Tensor>& mask, double temperature,
                 const std::optional<Tensor>& suppress_ids, const std::optional<Tensor>& target_ids,
                 const std::optional<Tensor>& previous_logits,
                 const std::optional<Tensor>& unconditional_logits, double cfg_scale,
                 std::optional<int64_t> top_k, std::optional<double> top_p,
                 std::optional<double> min_p, const std::optional<Tensor>& seed, bool raw,
                 std::optional<int64_t> vocab_start, bool shift,
                 const std::optional<Tensor>& row_keys) {
  const LogitArguments call = check_logit_arguments(
      {logits, mask, temperature, suppress_ids, target_ids, previous_logits, unconditional_logits,
       cfg_scale, top_k, top_p, min_p, seed, raw, vocab_start, shift, row_keys},
      check_device);
  const Stream stream(logits);
  const LogitOutputs out(logits, target_ids.has_value(), previous_logits.has_value());
  Shape part_shape = {0};
  if (vocab_start) {
    part_shape = leading_shape(logits);
    part_shape.push_back(layout_of(call, logits.scalar_type() == ScalarType::Double).words());
  }
  const Tensor part = empty(part_shape, statistics_dtype(logits), logits);
  measure_rows(call, MaskedTokens{}, seed, logits, out, stream,
               vocab_start ? std::optional<Tensor>(part) : std::nullopt);
  return std::tuple_cat(out.tensors(), std::make_tuple(part));
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("logit_stats", TORCH_BOX(&winnow::logit_stats_cuda));
}
