// winnow::select_positions on the GPU.
#include <optional>
#include <tuple>

#include "unmasking/selection_arguments.h"
#include "unmasking/selection_kernel.cuh"

namespace winnow {
namespace {

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
  m.impl("select_positions", TORCH_BOX(&winnow::select_positions_cuda));
}
