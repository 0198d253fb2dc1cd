// winnow::select_positions on the CPU. Every rule is an order of the masked positions and a count:
// how long a prefix of that order is unmasked. Rows are spread over threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/philox.h"
#include "common/tensors.h"
#include "unmasking/selection_rule.h"

namespace winnow {
namespace {

struct Candidate {
  double score;
  uint64_t lot;  // for the random order
  int64_t position;
};

void sort_candidates(std::vector<Candidate>& candidates, Order order) {
  std::stable_sort(candidates.begin(), candidates.end(),
                   [&](const Candidate& a, const Candidate& b) {
                     const bool a_nan = std::isnan(a.score);
                     const bool b_nan = std::isnan(b.score);
                     if (a_nan || b_nan) return !a_nan && b_nan;
                     switch (order) {
                       case kLowestFirst:
                         return a.score < b.score;
                       case kHighestFirst:
                         return a.score > b.score;
                       case kRandom:
                         return a.lot < b.lot;
                       default:
                         return false;
                     }
                   });
}

// Both sides in the dtype of the scores: a float32 score of 0.9 meets a threshold of 0.9.
template <typename T>
bool meets(const Rule& rule, double score) {
  const auto threshold = static_cast<double>(static_cast<T>(rule.threshold));
  switch (rule.criterion) {
    case kBelow:
      return score < threshold;
    case kAtLeast:
      return score >= threshold;
    default:
      return true;  // a number of tokens takes NaNs too, last
  }
}

// How many of the candidates, which are in the rule's order, it unmasks.
template <typename T>
int64_t count_prefix(const std::vector<Candidate>& candidates, const Rule& rule) {
  const auto n = static_cast<int64_t>(candidates.size());
  const auto threshold = static_cast<T>(rule.threshold);
  int64_t count = 0;
  if (rule.criterion == kEntropyBound) {
    // Ascending, so the sum without the largest is the sum of those before.
    double before = 0.0;
    while (count < n && static_cast<T>(before) <= threshold) before += candidates[count++].score;
    while (count > 0 && std::isnan(candidates[count - 1].score)) --count;
  } else if (rule.criterion == kConfidenceFactor) {
    for (int64_t i = 1; i <= n; ++i) {
      const double bound = static_cast<double>(i + 1) * (1.0 - candidates[i - 1].score);
      if (static_cast<T>(bound) < threshold) count = i;
    }
  } else {
    while (count < n && meets<T>(rule, candidates[count].score)) ++count;
  }
  return rule.limit >= 0 ? std::min(count, rule.limit) : count;
}

template <typename T>
int64_t select_row(const T* score, const bool* mask, int64_t start, int64_t end, const Rule& rule,
                   int64_t at_least, const uint64_t* seed, int64_t row,
                   std::vector<Candidate>& candidates, bool* transfer) {
  candidates.clear();
  for (int64_t l = start; l < end; ++l) {
    if (!mask[l]) continue;
    const uint64_t lot = seed == nullptr ? 0
                                         : philox_bits(*seed ^ kLotKey, static_cast<uint64_t>(row),
                                                       static_cast<uint64_t>(l));
    candidates.push_back({static_cast<double>(score[l]), lot, l});
  }
  // A left-to-right run ends at a NaN, so it is counted before NaNs are put last.
  int64_t count = rule.order == kLeftToRight ? count_prefix<T>(candidates, rule) : 0;
  const int64_t least =
      std::min(std::max<int64_t>(at_least, 1), static_cast<int64_t>(candidates.size()));
  if (rule.order != kLeftToRight || count < least) sort_candidates(candidates, rule.order);
  if (rule.order != kLeftToRight) count = count_prefix<T>(candidates, rule);
  count = std::max(count, least);
  for (int64_t i = 0; i < count; ++i) transfer[candidates[static_cast<size_t>(i)].position] = true;
  return count;
}

std::tuple<Tensor, Tensor> select_positions(const Tensor& score, const Tensor& mask, int64_t order,
                                            int64_t criterion, double threshold, int64_t limit,
                                            const std::optional<Tensor>& window,
                                            const std::optional<Tensor>& at_least,
                                            const std::optional<Tensor>& seed) {
  check_cpu("score", score);
  check_dim("score", score, 2, "(B, L)");
  const ScalarType dtype = score.scalar_type();
  WINNOW_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
               "score: expected float32 or float64, got ", name_of(dtype));
  check_cpu("mask", mask);
  check_dtype("mask", mask, ScalarType::Bool);
  WINNOW_CHECK(shape(mask) == shape(score), "mask: expected the shape of score, ", shape_of(score),
               ", got ", shape_of(mask));
  const int64_t batch = score.size(0);
  const int64_t length = score.size(1);
  const auto integers = [&](const char* name, const std::optional<Tensor>& tensor,
                            const Shape& sizes, const char* layout) -> std::optional<Tensor> {
    if (!tensor.has_value()) return std::nullopt;
    check_cpu(name, *tensor);
    check_dtype(name, *tensor, ScalarType::Long);
    WINNOW_CHECK(shape(*tensor) == sizes, name, ": expected ", layout, " with B=", batch,
                 " as in score, got ", shape_of(*tensor));
    return torch::stable::contiguous(*tensor);
  };
  const auto windows = integers("window", window, {batch, 2}, "(B, 2)");
  const auto least = integers("at_least", at_least, {batch}, "(B,)");
  const auto seeds = integers("seed", seed, {}, "one number");

  const Tensor scores = torch::stable::contiguous(score);
  const Tensor masks = torch::stable::contiguous(mask);
  Tensor transfer = empty({batch, length}, ScalarType::Bool, score);
  Tensor count = empty({batch}, ScalarType::Long, score);
  const Rule rule = {static_cast<Order>(order), static_cast<Criterion>(criterion), threshold,
                     limit};
  const auto data = [](const std::optional<Tensor>& tensor) {
    return tensor ? static_cast<const int64_t*>(tensor->data_ptr()) : nullptr;
  };
  const int64_t* bounds = data(windows);
  const int64_t* minimum = data(least);
  const auto* key = reinterpret_cast<const uint64_t*>(data(seeds));
  const auto* flags = static_cast<const bool*>(masks.data_ptr());
  auto* out = static_cast<bool*>(transfer.data_ptr());
  auto* counts = static_cast<int64_t*>(count.data_ptr());
  const auto run = [&](const auto* values) {
    torch::stable::parallel_for(0, batch, 1 + 4096 / (length + 1), [&](int64_t begin, int64_t end) {
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
  if (dtype == ScalarType::Double) {
    run(static_cast<const double*>(scores.data_ptr()));
  } else {
    run(static_cast<const float*>(scores.data_ptr()));
  }
  return {transfer, count};
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("select_positions", TORCH_BOX(&winnow::select_positions));
}
