// winnow::logit_stats on the CPU. Slices of all rows that count are spread over threads, so that
// one long row fills a machine too; then each row's slices are merged in order and its token is
// drawn.
#include "unmasking/logit_stats.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/philox.h"
#include "common/tensors.h"
#include "unmasking/logit_distribution.h"
#include "unmasking/logit_stats_simd.h"

namespace winnow {
namespace {

constexpr Truncation kKeepAll = {-std::numeric_limits<float>::infinity(), 0, -1};

// (0, 1), 64 bits, exact towards 0.
double open_uniform(uint32_t low, uint32_t high) {
  const uint64_t bits = (static_cast<uint64_t>(high) << 32) | low;
  return std::min((static_cast<double>(bits) + 0.5) * 0x1p-64, 1.0 - 0x1p-53);
}

// A slice in proportion to its mass, as the first arrival of exponential clocks, one per slice and
// keyed by it; then a token inside it. Exact in the tail: the clock resolves 2^-64, and inside a
// slice the distribution function is inverted in double.
int64_t draw_token(const LogitRows& rows, int64_t row, const LogitSliceSums* sums, double reference,
                   const LogitOptions& options, const Truncation& kept) {
  const int64_t slices = logit_slices(rows.vocab);
  double earliest = kInfinity;
  int64_t chosen = -1;
  double uniform = 0.0;
  for (int64_t s = 0; s < slices; ++s) {
    if (!(sums[s].drawn_mass > 0.0)) continue;
    const double log_mass =
        (sums[s].reference - reference) / options.draw_temperature + std::log(sums[s].drawn_mass);
    const Philox4 bits =
        philox(options.seed, static_cast<uint64_t>(row), static_cast<uint64_t>(s * kLogitSlice));
    const double arrival = -std::log1p(-open_uniform(bits.x[0], bits.x[1]));
    const double log_time = std::log(arrival) - log_mass;
    if (chosen >= 0 && !(log_time < earliest)) continue;
    earliest = log_time;
    chosen = s;
    uniform = open_uniform(bits.x[2], bits.x[3]);
  }
  if (chosen < 0) return -1;
  int64_t token = -1;
  WINNOW_SIMD(draw_in_logit_slice)
  (rows, row, chosen, sums[chosen].reference, options.draw_temperature, uniform, kept, &token);
  return token;
}

// One row from the sums of its slices.
RowStats finish_row(const LogitRows& rows, int64_t row, const LogitSliceSums* sums,
                    const LogitOptions& options, const int64_t* target) {
  RowStats stats;
  const LogitDistribution measured =
      merge_slices(sums, logit_slices(rows.vocab), options.temperature);
  const double top = measured.reference;
  if (top == kInfinity) {
    WINNOW_SIMD(find_infinite_logit)(rows, row, &stats.argmax);
    stats.token = stats.argmax;
    if (stats.argmax >= 0) stats.logsumexp = kInfinity;
    return stats;
  }
  if (measured.nan) return stats;
  if (top == -kInfinity) {
    stats.logsumexp = -kInfinity;
    return stats;
  }
  stats.argmax = measured.argmax;
  stats.max_prob = measured.max_prob();
  stats.margin = measured.margin();
  stats.entropy = measured.entropy();
  stats.logsumexp = measured.logsumexp();
  stats.token = measured.argmax;
  const auto log_prob = [&](int64_t index) {
    float logit;
    WINNOW_SIMD(logit_at)(rows, row, index, &logit);
    return measured.log_prob(logit);
  };
  if (options.draws) {
    stats.token = draw_token(rows, row, sums, top, options, kKeepAll);
  }
  stats.log_prob = stats.token == stats.argmax ? measured.log_prob(top) : log_prob(stats.token);
  if (target != nullptr) stats.target_log_prob = log_prob(*target);
  return stats;
}

// One statistic of every row, float or double.
struct Column {
  Tensor tensor;
  float* narrow;
  double* wide;

  Column(bool present, const Shape& rows, const Tensor& like)
      : tensor(empty(present ? rows : Shape{0}, statistics_dtype(like), like)) {
    const bool is_double = statistics_dtype(like) == ScalarType::Double;
    narrow = present && !is_double ? static_cast<float*>(tensor.data_ptr()) : nullptr;
    wide = present && is_double ? static_cast<double*>(tensor.data_ptr()) : nullptr;
  }

  void put(int64_t row, double value) const {
    if (narrow != nullptr) narrow[row] = static_cast<float>(value);
    if (wide != nullptr) wide[row] = value;
  }
};

struct Outputs {
  Tensor token, argmax;
  Column log_prob, max_prob, margin, entropy, logsumexp, target_log_prob, kl;
  int64_t* tokens;
  int64_t* argmaxes;

  Outputs(const Shape& rows, const Tensor& like, bool has_target, bool has_previous)
      : token(empty(rows, ScalarType::Long, like)),
        argmax(empty(rows, ScalarType::Long, like)),
        log_prob(true, rows, like),
        max_prob(true, rows, like),
        margin(true, rows, like),
        entropy(true, rows, like),
        logsumexp(true, rows, like),
        target_log_prob(has_target, rows, like),
        kl(has_previous, rows, like),
        tokens(static_cast<int64_t*>(token.data_ptr())),
        argmaxes(static_cast<int64_t*>(argmax.data_ptr())) {}

  void put(int64_t row, const RowStats& stats) const {
    tokens[row] = stats.token;
    argmaxes[row] = stats.argmax;
    log_prob.put(row, stats.log_prob);
    max_prob.put(row, stats.max_prob);
    margin.put(row, stats.margin);
    entropy.put(row, stats.entropy);
    logsumexp.put(row, stats.logsumexp);
    target_log_prob.put(row, stats.target_log_prob);
    kl.put(row, stats.kl);
  }
};

constexpr RowStats kSkipped = {-1, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0};

void check_like_logits(const char* argument, const Tensor& tensor, const Tensor& logits) {
  check_cpu(argument, tensor);
  check_dtype(argument, tensor, logits.scalar_type());
  WINNOW_CHECK(shape(tensor) == shape(logits), argument, ": expected the shape of logits, ",
               shape_of(logits), ", got ", shape_of(tensor));
}

void check_one_per_row(const char* argument, const Tensor& tensor, const Tensor& logits,
                       ScalarType dtype) {
  check_cpu(argument, tensor);
  check_dtype(argument, tensor, dtype);
  WINNOW_CHECK(shape(tensor) == leading_shape(logits), argument,
               ": expected one for each row of logits, whose shape is ", shape_of(logits), ", got ",
               shape_of(tensor));
}

std::vector<int64_t> sorted_ids(const Tensor& ids, int64_t vocab) {
  check_cpu("suppress_ids", ids);
  check_dtype("suppress_ids", ids, ScalarType::Long);
  check_dim("suppress_ids", ids, 1, "(n,)");
  const Tensor dense = torch::stable::contiguous(ids);
  const auto* begin = static_cast<const int64_t*>(dense.data_ptr());
  std::vector<int64_t> sorted(begin, begin + dense.numel());
  std::sort(sorted.begin(), sorted.end());
  WINNOW_CHECK(sorted.empty() || (sorted.front() >= 0 && sorted.back() < vocab),
               "suppress_ids: expected ids in [0, ", vocab, "), got ",
               sorted.empty()       ? 0
               : sorted.front() < 0 ? sorted.front()
                                    : sorted.back());
  return sorted;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> logit_stats(
    const Tensor& logits, const std::optional<Tensor>& mask, double temperature,
    const std::optional<Tensor>& suppress_ids, const std::optional<Tensor>& target_ids,
    const std::optional<Tensor>& unconditional_logits, double cfg_scale,
    const std::optional<Tensor>& seed, bool raw) {
  check_cpu("logits", logits);
  check_floating("logits", logits);
  WINNOW_CHECK(logits.dim() >= 1, "logits: expected (..., V), got a scalar");
  WINNOW_CHECK(std::isfinite(temperature) && temperature >= 0.0,
               "temperature: expected a finite number >= 0, got ", temperature);
  WINNOW_CHECK(std::isfinite(cfg_scale), "cfg_scale: expected a finite number, got ", cfg_scale);

  const Rows rows = as_rows(logits);
  LogitRows view = {rows.tensor.data_ptr(), rows.stride, nullptr, 0,          1.0f,
                    element_type(logits),   nullptr,     0,       rows.length};
  std::optional<Rows> unconditional;
  if (unconditional_logits.has_value()) {
    check_like_logits("unconditional_logits", *unconditional_logits, logits);
    unconditional = as_rows(*unconditional_logits);
    view.unconditional = unconditional->tensor.data_ptr();
    view.unconditional_stride = unconditional->stride;
    view.guidance = static_cast<float>(cfg_scale + 1.0);
  }
  std::vector<int64_t> suppressed;
  if (suppress_ids.has_value()) {
    suppressed = sorted_ids(*suppress_ids, rows.length);
    view.suppressed = suppressed.data();
    view.suppressed_count = static_cast<int64_t>(suppressed.size());
  }
  std::vector<int64_t> active;
  active.reserve(static_cast<size_t>(rows.count));
  std::optional<Tensor> chosen;
  if (mask.has_value()) {
    check_one_per_row("mask", *mask, logits, ScalarType::Bool);
    chosen = torch::stable::contiguous(*mask);
  }
  const bool* counts = chosen ? static_cast<const bool*>(chosen->data_ptr()) : nullptr;
  for (int64_t r = 0; r < rows.count; ++r) {
    if (counts == nullptr || counts[r]) active.push_back(r);
  }
  std::optional<Tensor> target;
  if (target_ids.has_value()) {
    check_one_per_row("target_ids", *target_ids, logits, ScalarType::Long);
    target = torch::stable::contiguous(*target_ids);
    const auto* ids = static_cast<const int64_t*>(target->data_ptr());
    for (const int64_t r : active) {
      WINNOW_CHECK(ids[r] >= 0 && ids[r] < rows.length, "target_ids: expected ids in [0, ",
                   rows.length, ") where mask is true, got ", ids[r]);
    }
  }
  const int64_t* targets = target ? static_cast<const int64_t*>(target->data_ptr()) : nullptr;

  LogitOptions options = {};
  options.raw = raw;
  options.draws = seed.has_value() && temperature > 0.0;
  options.temperature = raw || temperature == 0.0 ? 1.0 : temperature;
  options.draw_temperature = options.draws ? temperature : options.temperature;
  if (seed.has_value()) {
    check_cpu("seed", *seed);
    check_dtype("seed", *seed, ScalarType::Long);
    check_dim("seed", *seed, 0, "one number");
    options.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
  }

  Outputs out(leading_shape(logits), logits, target.has_value(), false);
  if (counts != nullptr) {
    for (int64_t r = 0; r < rows.count; ++r) {
      if (!counts[r]) out.put(r, kSkipped);
    }
  }
  const auto active_count = static_cast<int64_t>(active.size());
  const int64_t slices = logit_slices(rows.length);
  std::vector<LogitSliceSums> sums(static_cast<size_t>(active_count * slices));
  const auto scan = WINNOW_SIMD(scan_logit_slices);
  torch::stable::parallel_for(0, active_count * slices, 4, [&](int64_t begin, int64_t end) {
    scan(view, active.data(), begin, end - begin, options.temperature, options.draw_temperature,
         sums.data() + begin);
  });
  torch::stable::parallel_for(0, active_count, 4, [&](int64_t begin, int64_t end) {
    for (int64_t a = begin; a < end; ++a) {
      const int64_t row = active[static_cast<size_t>(a)];
      out.put(row, finish_row(view, row, sums.data() + a * slices, options,
                              targets == nullptr ? nullptr : targets + row));
    }
  });
  return {out.token,         out.log_prob.tensor, out.argmax,           out.max_prob.tensor,
          out.margin.tensor, out.entropy.tensor,  out.logsumexp.tensor, out.target_log_prob.tensor,
          out.kl.tensor};
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("logit_stats", TORCH_BOX(&winnow::logit_stats));
}
