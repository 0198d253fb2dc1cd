// winnow::logit_stats on the GPU: checks, and the order of the launches. Two without truncation and
// divergence; ids and seed stay on the device.
#include <cmath>
#include <optional>
#include <tuple>

#include "unmasking/logit_rows_kernel.cuh"

namespace winnow {
namespace {

constexpr int64_t kMostVocab = int64_t{1} << 19;  // what masses in fixed point hold

void check_like_logits(const char* argument, const Tensor& tensor, const Tensor& logits) {
  check_device(argument, tensor);
  check_dtype(argument, tensor, logits.scalar_type());
  WINNOW_CHECK(shape(tensor) == shape(logits), argument, ": expected the shape of logits, ",
               shape_of(logits), ", got ", shape_of(tensor));
}

Tensor one_per_row(const char* argument, const Tensor& tensor, const Tensor& logits,
                   ScalarType dtype) {
  check_device(argument, tensor);
  check_dtype(argument, tensor, dtype);
  WINNOW_CHECK(shape(tensor) == leading_shape(logits), argument,
               ": expected one for each row of logits, whose shape is ", shape_of(logits), ", got ",
               shape_of(tensor));
  return torch::stable::contiguous(tensor);
}

bool reads_vectors(const Rows& rows) {
  const auto bytes = static_cast<int64_t>(rows.tensor.element_size());
  return reinterpret_cast<uintptr_t>(rows.tensor.data_ptr()) % 16 == 0 &&
         (rows.count <= 1 || rows.stride * bytes % 16 == 0);
}

// The checked arguments.
struct Problem {
  Rows rows;
  std::optional<Rows> unconditional;
  std::optional<Rows> previous;
  std::optional<Tensor> mask;
  std::optional<Tensor> suppressed;
  double guidance;
  RowOptions options;
  int64_t top_k;  // 0: all
  double top_p;   // 1: all
};

template <typename T, typename Real>
LogitView<T, Real> view_of(const Problem& problem, const Rows& rows) {
  LogitView<T, Real> view = {};
  view.logits = global<const T>(rows.tensor);
  view.stride = rows.stride;
  view.vectors = reads_vectors(rows);
  view.vocab = rows.length;
  if (problem.suppressed) {
    view.suppressed = global<const int64_t>(*problem.suppressed);
    view.suppressed_count = problem.suppressed->numel();
  }
  if (problem.mask) view.mask = global<const bool>(*problem.mask);
  return view;
}

template <typename T, typename Real>
void run(const Problem& problem, const RowOutputs<Real>& out, const Tensor& like,
         const Stream& stream) {
  const RowOptions& options = problem.options;
  const Rows& rows = problem.rows;
  const int64_t slices = ceil_div<int64_t>(rows.length, kSlice);
  LogitView<T, Real> view = view_of<T, Real>(problem, rows);
  if (problem.unconditional) {
    view.unconditional = global<const T>(problem.unconditional->tensor);
    view.unconditional_stride = problem.unconditional->stride;
    view.vectors = view.vectors && reads_vectors(*problem.unconditional);
    view.guidance = static_cast<Real>(problem.guidance);
  }
  const auto workspace = [&](int64_t count, size_t bytes) {
    return empty({count, static_cast<int64_t>(bytes / sizeof(double))}, ScalarType::Double, like);
  };
  const Grid every_slice = {rows.count, slices};
  const Grid every_row = {rows.count};
  const int64_t parts = rows.count * slices;

  const Tensor sums = workspace(parts, sizeof(SliceSums));
  const auto slice_sums = global<SliceSums>(sums);
  launch("logit_stats", scan_slices<T, Real>, every_slice, kThreads, stream, view,
         options.temperature, options.draw_temperature, slice_sums);
  const bool truncates = options.truncates;
  const Tensor truncations = workspace(truncates ? rows.count : 0, sizeof(Truncation));
  const Tensor kept = workspace(truncates ? parts : 0, sizeof(Sums));
  const auto kept_sums = global<Sums>(kept);
  if (truncates) {
    launch("logit_stats", truncate_rows<T, Real>, every_row, kThreads, stream, view,
           options.temperature, options.draw_temperature, problem.top_k, problem.top_p, slice_sums,
           global<Truncation>(truncations), kept_sums);
  }
  launch("logit_stats", finish_rows<T, Real>, every_row, kThreads, stream, view, options,
         slice_sums, global<Truncation>(truncations), kept_sums, out);
  if (!problem.previous) return;

  const LogitView<T, Real> previous = view_of<T, Real>(problem, *problem.previous);
  const Tensor before = workspace(parts, sizeof(SliceSums));
  const auto previous_sums = global<SliceSums>(before);
  const Tensor cross = workspace(parts, sizeof(double));
  const bool described = truncates && !options.raw;
  launch("logit_stats", scan_slices<T, Real>, every_slice, kThreads, stream, previous,
         options.temperature, options.temperature, previous_sums);
  launch("logit_stats", cross_slices<T, Real>, every_slice, kThreads, stream, view, previous,
         options.temperature, slice_sums, previous_sums,
         described ? global<Truncation>(truncations) : Global<Truncation>(nullptr),
         global<double>(cross));
  launch("logit_stats", diverge_rows<T, Real>, every_row, kThreads, stream, view,
         options.temperature, slice_sums, previous_sums,
         described ? kept_sums : Global<Sums>(nullptr), global<double>(cross), out.kl);
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> logit_stats_cuda(
    const Tensor& logits, const std::optional<Tensor>& mask, double temperature,
    const std::optional<Tensor>& suppress_ids, const std::optional<Tensor>& target_ids,
    const std::optional<Tensor>& previous_logits, const std::optional<Tensor>& unconditional_logits,
    double cfg_scale, std::optional<int64_t> top_k, std::optional<double> top_p,
    const std::optional<Tensor>& seed, bool raw) {
  check_device("logits", logits);
  check_floating("logits", logits);
  WINNOW_CHECK(logits.dim() >= 1, "logits: expected (..., V), got a scalar");
  check_options(temperature, cfg_scale, top_k, top_p);

  const Stream stream(logits);
  Problem problem = {as_rows(logits), {}, {}, {}, {}, cfg_scale + 1.0, {}, 0, 1.0};
  const Rows& rows = problem.rows;
  if (suppress_ids) {
    check_device("suppress_ids", *suppress_ids);
    check_dtype("suppress_ids", *suppress_ids, ScalarType::Long);
    check_dim("suppress_ids", *suppress_ids, 1, "(n,)");
    problem.suppressed = torch::stable::contiguous(*suppress_ids);
  }
  if (previous_logits) {
    check_like_logits("previous_logits", *previous_logits, logits);
    problem.previous = as_rows(*previous_logits);
  }
  if (unconditional_logits) {
    check_like_logits("unconditional_logits", *unconditional_logits, logits);
    problem.unconditional = as_rows(*unconditional_logits);
  }
  if (mask) problem.mask = one_per_row("mask", *mask, logits, ScalarType::Bool);
  std::optional<Tensor> target;
  if (target_ids) target = one_per_row("target_ids", *target_ids, logits, ScalarType::Long);

  RowOptions& options = problem.options;
  options.raw = raw;
  options.draws = seed.has_value() && temperature > 0.0;
  options.draw_temperature = temperature > 0.0 ? temperature : 1.0;
  options.temperature = raw ? 1.0 : options.draw_temperature;
  if (raw && !options.draws) {  // nothing describes the processed distribution
    options.draw_temperature = 1.0;
  } else {
    problem.top_k = top_k && *top_k < rows.length ? *top_k : 0;
    problem.top_p = top_p.value_or(1.0);
  }
  options.truncates = problem.top_k > 0 || problem.top_p < 1.0;
  WINNOW_CHECK(problem.top_p == 1.0 || rows.length <= kMostVocab,
               "top_p: expected a vocabulary of at most ", kMostVocab, " tokens on the GPU, got ",
               rows.length);
  if (seed) options.seed = seed_of(*seed);
  if (target) options.target = global<const int64_t>(*target);

  const Shape leading = leading_shape(logits);
  const ScalarType dtype = statistics_dtype(logits);
  const Tensor token = empty(leading, ScalarType::Long, logits);
  const Tensor argmax = empty(leading, ScalarType::Long, logits);
  const Shape none = {0};
  Tensor statistic[7];
  for (int i = 0; i < 7; ++i) {
    const bool present = i < 5 || (i == 5 ? target_ids : previous_logits).has_value();
    statistic[i] = empty(present ? leading : none, dtype, logits);
  }
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
    RowOutputs<Real> out = {};
    out.token = global<int64_t>(token);
    out.argmax = global<int64_t>(argmax);
    out.log_prob = global<Real>(statistic[0]);
    out.max_prob = global<Real>(statistic[1]);
    out.margin = global<Real>(statistic[2]);
    out.entropy = global<Real>(statistic[3]);
    out.logsumexp = global<Real>(statistic[4]);
    if (target_ids) out.target_log_prob = global<Real>(statistic[5]);
    if (previous_logits) out.kl = global<Real>(statistic[6]);
    run<T, Real>(problem, out, logits, stream);
  });
  return {token,        statistic[0], argmax,       statistic[1], statistic[2],
          statistic[3], statistic[4], statistic[5], statistic[6]};
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("logit_stats", TORCH_BOX(&winnow::logit_stats_cuda));
}
