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
#include "unmasking/logit_outputs.h"
#include "unmasking/logit_stats_simd.h"
#include "unmasking/logit_truncation_simd.h"

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

// A row before it is rounded, and what later stages need of it.
struct Row {
  RowStats stats;
  LogitDistribution measured;  // what the statistics describe
  Truncation kept = kKeepAll;  // what of it is kept
  bool proper = false;         // false: a NaN, nothing finite, or +infinity
};

// Whether the second largest logit survives a truncation.
bool keeps_second(const LogitDistribution& full, const Truncation& kept) {
  const double cut = kept.threshold;
  return full.second > cut ||
         (full.second == cut && (full.reference > cut ? kept.ties >= 1 : kept.ties >= 2));
}

// One row from the sums of its slices, which a truncation replaces. `scratch` is for the latter.
Row finish_row(const LogitRows& rows, int64_t row, LogitSliceSums* sums,
               const LogitOptions& options, const int64_t* target, std::vector<float>& scratch) {
  Row result;
  RowStats& stats = result.stats;
  const int64_t slices = logit_slices(rows.vocab);
  LogitDistribution& measured = result.measured;
  measured = merge_slices(sums, slices, options.temperature);
  const double top = measured.reference;
  if (top == kInfinity) {
    WINNOW_SIMD(find_infinite_logit)(rows, row, &stats.argmax);
    stats.token = stats.argmax;
    if (stats.argmax >= 0) stats.logsumexp = kInfinity;
    return result;
  }
  if (measured.nan) return result;
  if (top == -kInfinity) {
    stats.logsumexp = -kInfinity;
    return result;
  }
  Truncation drawn = kKeepAll;
  if (options.truncates()) {
    scratch.resize(static_cast<size_t>(rows.vocab));
    const auto reference = static_cast<float>(top);
    double mass = 0.0;
    for (int64_t s = 0; s < slices; ++s) {
      const double weight = std::exp((sums[s].reference - top) / options.draw_temperature);
      if (weight > 0.0) mass += weight * sums[s].drawn_mass;
    }
    WINNOW_SIMD(find_truncation)
    (rows, row, reference, options.draw_temperature, options.top_k, options.top_p, mass,
     scratch.data(), &drawn);
    WINNOW_SIMD(sum_kept_slices)(rows, row, reference, options.draw_temperature, drawn, sums);
    if (!options.raw) {
      const LogitDistribution full = measured;
      measured = merge_slices(sums, slices, options.temperature);
      measured.argmax = full.argmax;
      measured.second = keeps_second(full, drawn) ? full.second : -kInfinity;
      result.kept = drawn;
    }
  }
  result.proper = true;
  stats.argmax = measured.argmax;
  stats.max_prob = measured.max_prob();
  stats.margin = measured.margin();
  stats.entropy = measured.entropy();
  stats.logsumexp = measured.logsumexp();
  stats.token = options.draws ? draw_token(rows, row, sums, top, options, drawn) : measured.argmax;
  const auto log_prob = [&](int64_t index) {
    float logit;
    WINNOW_SIMD(logit_at)(rows, row, index, &logit);
    const Truncation& kept = result.kept;
    const bool keeps =
        logit > kept.threshold || (logit == kept.threshold && index <= kept.last_tie);
    return keeps ? measured.log_prob(logit) : -kInfinity;
  };
  stats.log_prob = stats.token == stats.argmax ? measured.log_prob(top) : log_prob(stats.token);
  if (target != nullptr) stats.target_log_prob = log_prob(*target);
  return result;
}

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

// Everything that the loops are told, checked, with the tensors that keep the memory alive.
struct Problem {
  Rows rows;
  LogitRows view;
  std::optional<Rows> unconditional;
  std::optional<Rows> previous;
  LogitRows previous_view;
  std::vector<int64_t> suppressed;
  std::optional<Tensor> mask;
  std::optional<Tensor> target;
  std::vector<int64_t> active;
  LogitOptions options;

  const LogitRows* before() const { return previous ? &previous_view : nullptr; }
  const int64_t* target_of(int64_t row) const {
    return target ? static_cast<const int64_t*>(target->data_ptr()) + row : nullptr;
  }
};

// The whole rows of finished distributions: KL(current || previous) from the cross term, slice by
// slice, and the two normalisers.
void add_divergence(const Problem& problem, std::vector<Row>& results) {
  const auto count = static_cast<int64_t>(problem.active.size());
  const int64_t slices = logit_slices(problem.rows.length);
  const double temperature = problem.options.temperature;
  std::vector<LogitSliceSums> sums(static_cast<size_t>(count * slices));
  std::vector<double> cross(static_cast<size_t>(count * slices));
  std::vector<LogitDistribution> before(static_cast<size_t>(count));
  const auto scan = WINNOW_SIMD(scan_logit_slices);
  const auto cross_slice = WINNOW_SIMD(cross_logit_slice);
  torch::stable::parallel_for(0, count * slices, 4, [&](int64_t begin, int64_t end) {
    scan(problem.previous_view, problem.active.data(), begin, end - begin, temperature, temperature,
         sums.data() + begin);
  });
  for (int64_t a = 0; a < count; ++a) {
    before[static_cast<size_t>(a)] = merge_slices(sums.data() + a * slices, slices, temperature);
  }
  torch::stable::parallel_for(0, count * slices, 4, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const auto a = static_cast<size_t>(u / slices);
      if (!results[a].proper) continue;
      cross_slice(problem.view, problem.previous_view, problem.active[a], u % slices,
                  static_cast<float>(results[a].measured.reference),
                  static_cast<float>(before[a].reference), temperature, results[a].kept,
                  &cross[static_cast<size_t>(u)]);
    }
  });
  for (int64_t a = 0; a < count; ++a) {
    Row& row = results[static_cast<size_t>(a)];
    const LogitDistribution& previous = before[static_cast<size_t>(a)];
    if (!row.proper || previous.nan || previous.reference == kInfinity) continue;
    if (previous.reference == -kInfinity) {
      row.stats.kl = kInfinity;
      continue;
    }
    double sum = 0.0;
    for (int64_t s = 0; s < slices; ++s) sum += cross[static_cast<size_t>(a * slices + s)];
    const double kl =
        sum / row.measured.mass - std::log(row.measured.mass) + std::log(previous.mass);
    row.stats.kl = std::max(kl, 0.0);
  }
}

// The loops for float, bfloat16 and half.
std::vector<Row> run(const Problem& problem) {
  const LogitOptions& options = problem.options;
  const auto count = static_cast<int64_t>(problem.active.size());
  const int64_t slices = logit_slices(problem.rows.length);
  std::vector<LogitSliceSums> sums(static_cast<size_t>(count * slices));
  std::vector<Row> results(static_cast<size_t>(count));
  const auto scan = WINNOW_SIMD(scan_logit_slices);
  torch::stable::parallel_for(0, count * slices, 4, [&](int64_t begin, int64_t end) {
    scan(problem.view, problem.active.data(), begin, end - begin, options.temperature,
         options.draw_temperature, sums.data() + begin);
  });
  const int64_t grain = options.truncates() ? 1 : 4;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch;
    for (int64_t a = begin; a < end; ++a) {
      const int64_t row = problem.active[static_cast<size_t>(a)];
      results[static_cast<size_t>(a)] = finish_row(problem.view, row, sums.data() + a * slices,
                                                   options, problem.target_of(row), scratch);
    }
  });
  if (problem.previous) add_divergence(problem, results);
  return results;
}

std::vector<Row> run_double(const Problem& problem) {
  std::vector<Row> results(problem.active.size());
  torch::stable::parallel_for(
      0, static_cast<int64_t>(results.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t a = begin; a < end; ++a) {
          const int64_t row = problem.active[static_cast<size_t>(a)];
          results[static_cast<size_t>(a)].stats = double_row_stats(
              problem.view, problem.before(), row, problem.options, problem.target_of(row));
        }
      });
  return results;
}

void check_options(double temperature, double cfg_scale, const std::optional<int64_t>& top_k,
                   const std::optional<double>& top_p) {
  WINNOW_CHECK(std::isfinite(temperature) && temperature >= 0.0,
               "temperature: expected a finite number >= 0, got ", temperature);
  WINNOW_CHECK(std::isfinite(cfg_scale), "cfg_scale: expected a finite number, got ", cfg_scale);
  WINNOW_CHECK(!top_k || *top_k >= 1, "top_k: expected at least 1, got ", top_k.value_or(1));
  WINNOW_CHECK(!top_p || (*top_p > 0.0 && *top_p <= 1.0),
               "top_p: expected a number in (0, 1], got ", top_p.value_or(1.0));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> logit_stats(
    const Tensor& logits, const std::optional<Tensor>& mask, double temperature,
    const std::optional<Tensor>& suppress_ids, const std::optional<Tensor>& target_ids,
    const std::optional<Tensor>& previous_logits, const std::optional<Tensor>& unconditional_logits,
    double cfg_scale, std::optional<int64_t> top_k, std::optional<double> top_p,
    const std::optional<Tensor>& seed, bool raw) {
  check_cpu("logits", logits);
  check_floating("logits", logits);
  WINNOW_CHECK(logits.dim() >= 1, "logits: expected (..., V), got a scalar");
  check_options(temperature, cfg_scale, top_k, top_p);

  Problem problem = {};
  problem.rows = as_rows(logits);
  const Rows& rows = problem.rows;
  LogitRows& view = problem.view;
  view = {rows.tensor.data_ptr(), rows.stride, nullptr, 0,          1.0,
          element_type(logits),   nullptr,     0,       rows.length};
  if (suppress_ids.has_value()) {
    problem.suppressed = sorted_ids(*suppress_ids, rows.length);
    view.suppressed = problem.suppressed.data();
    view.suppressed_count = static_cast<int64_t>(problem.suppressed.size());
  }
  if (previous_logits.has_value()) {
    check_like_logits("previous_logits", *previous_logits, logits);
    problem.previous = as_rows(*previous_logits);
    problem.previous_view = view;
    problem.previous_view.logits = problem.previous->tensor.data_ptr();
    problem.previous_view.stride = problem.previous->stride;
  }
  if (unconditional_logits.has_value()) {
    check_like_logits("unconditional_logits", *unconditional_logits, logits);
    problem.unconditional = as_rows(*unconditional_logits);
    view.unconditional = problem.unconditional->tensor.data_ptr();
    view.unconditional_stride = problem.unconditional->stride;
    view.guidance = cfg_scale + 1.0;
  }
  if (mask.has_value()) {
    check_one_per_row("mask", *mask, logits, ScalarType::Bool);
    problem.mask = torch::stable::contiguous(*mask);
  }
  const bool* counts = problem.mask ? static_cast<const bool*>(problem.mask->data_ptr()) : nullptr;
  problem.active.reserve(static_cast<size_t>(rows.count));
  for (int64_t r = 0; r < rows.count; ++r) {
    if (counts == nullptr || counts[r]) problem.active.push_back(r);
  }
  if (target_ids.has_value()) {
    check_one_per_row("target_ids", *target_ids, logits, ScalarType::Long);
    problem.target = torch::stable::contiguous(*target_ids);
    for (const int64_t r : problem.active) {
      const int64_t id = *problem.target_of(r);
      WINNOW_CHECK(id >= 0 && id < rows.length, "target_ids: expected ids in [0, ", rows.length,
                   ") where mask is true, got ", id);
    }
  }
  LogitOptions& options = problem.options;
  options.raw = raw;
  options.draws = seed.has_value() && temperature > 0.0;
  options.draw_temperature = temperature > 0.0 ? temperature : 1.0;
  options.temperature = raw ? 1.0 : options.draw_temperature;
  options.top_k = top_k.has_value() && *top_k < rows.length ? *top_k : 0;
  options.top_p = top_p.value_or(1.0);
  if (raw && !options.draws) {  // nothing describes the processed distribution
    options.draw_temperature = 1.0;
    options.top_k = 0;
    options.top_p = 1.0;
  }
  if (seed.has_value()) {
    check_cpu("seed", *seed);
    check_dtype("seed", *seed, ScalarType::Long);
    check_dim("seed", *seed, 0, "one number");
    options.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
  }

  const Outputs out(leading_shape(logits), logits, target_ids.has_value(),
                    previous_logits.has_value());
  const std::vector<Row> results =
      view.type == ElementType::kDouble ? run_double(problem) : run(problem);
  for (size_t a = 0; a < results.size(); ++a) out.put(problem.active[a], results[a].stats);
  if (counts != nullptr) {
    for (int64_t r = 0; r < rows.count; ++r) {
      if (!counts[r]) out.put(r, kSkipped);
    }
  }
  return {out.token,         out.log_prob.tensor, out.argmax,           out.max_prob.tensor,
          out.margin.tensor, out.entropy.tensor,  out.logsumexp.tensor, out.target_log_prob.tensor,
          out.kl.tensor};
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("logit_stats", TORCH_BOX(&winnow::logit_stats));
}
