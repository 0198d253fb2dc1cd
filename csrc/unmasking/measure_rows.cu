// The kernels of logit_stats are compiled here alone, for every op that measures rows of logits.
// The order of the launches: two without truncation and divergence, one more for a part of a
// vocabulary. Ids and seed stay on the device.
#include "unmasking/measure_rows.cuh"

#include "unmasking/logit_parts_kernel.cuh"

namespace winnow {
namespace {

constexpr int64_t kMostVocab = int64_t{1} << 19;  // what masses in fixed point hold

bool reads_vectors(const Rows& rows) {
  const auto bytes = static_cast<int64_t>(rows.tensor.element_size());
  return reinterpret_cast<uintptr_t>(rows.tensor.data_ptr()) % 16 == 0 &&
         (rows.count <= 1 || rows.stride * bytes % 16 == 0);
}

template <typename T, typename Real>
LogitView<T, Real> view_of(const LogitArguments& call, const Rows& rows,
                           const MaskedTokens& tokens) {
  LogitView<T, Real> view = {};
  view.logits = global<const T>(rows.tensor);
  view.stride = rows.stride;
  view.start = call.start;
  view.vectors = reads_vectors(rows) && view.offset() * sizeof(T) % 16 == 0;
  view.vocab = rows.length;
  if (call.suppressed) {
    view.suppressed = global<const int64_t>(*call.suppressed);
    view.given_count = view.suppressed_count = call.suppressed->numel();
  }
  if (tokens.length > 0 && tokens.mask_id >= 0 && tokens.mask_id < rows.length) {
    ++view.suppressed_count;
  }
  view.tokens = tokens;
  view.shifted = call.shifted;
  if (call.keys) view.keys = global<const int64_t>(*call.keys);
  if (call.mask) view.mask = global<const bool>(*call.mask);
  return view;
}

template <typename T, typename Real>
void launch_rows(const LogitArguments& call, const RowOptions& options, const MaskedTokens& tokens,
                 const RowOutputs<Real>& out, const std::optional<Tensor>& part, const Tensor& like,
                 const Stream& stream) {
  const Rows& rows = call.rows;
  const int64_t blocks = logit_blocks(call.start, rows.length);
  LogitView<T, Real> view = view_of<T, Real>(call, rows, tokens);
  if (call.unconditional) {
    view.unconditional = global<const T>(call.unconditional->tensor);
    view.unconditional_stride = call.unconditional->stride;
    view.vectors = view.vectors && reads_vectors(*call.unconditional);
    view.guidance = static_cast<Real>(call.guidance);
  }
  const auto workspace = [&](int64_t count, size_t bytes) {
    return empty({count, static_cast<int64_t>(bytes / sizeof(double))}, ScalarType::Double, like);
  };
  const Grid every_slice = {rows.count, ceil_div<int64_t>(blocks, kSliceBlocks)};
  const Grid every_row = {rows.count};
  const int64_t all = rows.count * blocks;

  const Tensor sums = workspace(all, sizeof(SliceSums));
  const auto block_sums = global<SliceSums>(sums);
  launch("logit_stats", scan_blocks<T, Real>, every_slice, kThreads, stream, view,
         options.temperature, options.draw_temperature, block_sums, blocks);
  const bool truncates = options.truncates;
  const Tensor truncations = workspace(truncates ? rows.count : 0, sizeof(Truncation));
  const Tensor kept = workspace(truncates ? all : 0, sizeof(Sums));
  const auto kept_sums = global<Sums>(kept);
  if (truncates) {
    launch("logit_stats", truncate_rows<T, Real>, every_row, kThreads, stream, view,
           options.temperature, options.draw_temperature, call.options.top_k, call.options.top_p,
           call.options.reach(), block_sums, global<Truncation>(truncations), kept_sums);
  }
  launch("logit_stats", finish_rows<T, Real>, every_row, kThreads, stream, view, options,
         block_sums, global<Truncation>(truncations), kept_sums, out);
  LogitView<T, Real> previous = {};
  const Tensor before = workspace(call.previous ? all : 0, sizeof(SliceSums));
  const Tensor cross = workspace(call.previous ? all : 0, sizeof(double));
  const auto previous_sums = global<SliceSums>(before);
  if (call.previous) {
    previous = view_of<T, Real>(call, *call.previous, tokens);
    const bool described = truncates && !options.raw;
    launch("logit_stats", scan_blocks<T, Real>, every_slice, kThreads, stream, previous,
           options.temperature, options.temperature, previous_sums, blocks);
    launch("logit_stats", cross_blocks<T, Real>, every_slice, kThreads, stream, view, previous,
           options.temperature, block_sums, previous_sums,
           described ? global<Truncation>(truncations) : Global<Truncation>(nullptr),
           global<double>(cross), blocks);
    launch("logit_stats", diverge_rows<T, Real>, every_row, kThreads, stream, view,
           options.temperature, block_sums, previous_sums,
           described ? kept_sums : Global<Sums>(nullptr), global<double>(cross), out.kl);
  }
  if (part) {
    launch("logit_stats", write_parts<T, Real>, every_row, kThreads, stream, view, previous,
           options, layout_of(call, std::is_same_v<Real, double>), block_sums,
           PreviousSums{previous_sums, global<double>(cross)}, global<Real>(*part));
  }
}

}  // namespace

void measure_rows(const LogitArguments& call, const MaskedTokens& tokens,
                  const std::optional<Tensor>& seed, const Tensor& logits, const LogitOutputs& out,
                  const Stream& stream, const std::optional<Tensor>& part) {
  WINNOW_CHECK(call.options.top_p == 1.0 || call.rows.length <= kMostVocab,
               "top_p: expected a vocabulary of at most ", kMostVocab, " tokens on the GPU, got ",
               call.rows.length);
  RowOptions options = {};
  options.temperature = call.options.temperature;
  options.draw_temperature = call.options.draw_temperature;
  options.draws = call.options.draws;
  options.truncates = call.options.truncates();
  options.raw = call.options.raw;
  options.is_part = call.is_part;
  if (seed) options.seed = seed_of(*seed);
  if (call.target) options.target = global<const int64_t>(*call.target);
  dispatch_floating(logits, [&](auto zero) {
    using T = decltype(zero);
    using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
    launch_rows<T, Real>(call, options, tokens, out.pointers<Real>(), part, logits, stream);
  });
}

}  // namespace winnow
