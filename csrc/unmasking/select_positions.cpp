// winnow::select_positions on the CPU. Rows are spread over threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "unmasking/selection.h"
#include "unmasking/selection_arguments.h"

namespace winnow {
namespace {

std::tuple<Tensor, Tensor> select_positions(const Tensor& score, const Tensor& mask, int64_t order,
                                            int64_t criterion, double threshold, int64_t limit,
                                            const std::optional<Tensor>& window,
                                            const std::optional<Tensor>& at_least,
                                            const std::optional<Tensor>& seed) {
  const SelectionArguments call = check_selection(score, mask, window, at_least, check_cpu);
  const auto seeds = check_integers("seed", seed, {}, "one number", "", check_cpu);
  const int64_t batch = score.size(0);
  const int64_t length = score.size(1);
  Tensor transfer = empty({batch, length}, ScalarType::Bool, score);
  Tensor count = empty({batch}, ScalarType::Long, score);
  const Rule rule = make_rule(order, criterion, threshold, limit);
  const auto data = [](const std::optional<Tensor>& tensor) {
    return tensor ? static_cast<const int64_t*>(tensor->data_ptr()) : nullptr;
  };
  const int64_t* bounds = data(call.window);
  const int64_t* minimum = data(call.at_least);
  const auto* key = reinterpret_cast<const uint64_t*>(data(seeds));
  const auto* flags = static_cast<const bool*>(call.mask.data_ptr());
  auto* out = static_cast<bool*>(transfer.data_ptr());
  auto* counts = static_cast<int64_t*>(count.data_ptr());
  const auto run = [&](const auto* values) {
    parallel_for(0, batch, 1 + 4096 / (length + 1), [&](int64_t begin, int64_t end) {
      std::vector<Candidate> candidates;
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = bounds == nullptr ? 0 : std::max<int64_t>(bounds[2 * b], 0);
        const int64_t last = bounds == nullptr ? length : std::min(bounds[2 * b + 1], length);
        std::fill(out + b * length, out + (b + 1) * length, false);
        counts[b] =
            select_row(values + b * length, flags + b * length, first, last, rule,
                       minimum == nullptr ? 1 : minimum[b], key, b, candidates, out + b * length);
      }
    });
  };
  if (score.scalar_type() == ScalarType::Double) {
    run(static_cast<const double*>(call.score.data_ptr()));
  } else {
    run(static_cast<const float*>(call.score.data_ptr()));
  }
  return {transfer, count};
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("select_positions", TORCH_BOX(&winnow::select_positions));
}
