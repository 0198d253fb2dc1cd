// winnow::soft_embedding on the CPU. Blocks of all rows that count are spread over threads for the
// entropies; then, a row at a time, top-k and top-p are found without a sort, what they keep is
// listed, and only those rows of the embedding are read.
#include "unmasking/soft_embedding.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "common/parallel.h"
#include "unmasking/logit_distribution.h"
#include "unmasking/logit_stats_simd.h"
#include "unmasking/logit_truncation_simd.h"
#include "unmasking/soft_embedding_simd.h"

namespace winnow {
namespace {

// The checked arguments.
struct Problem {
  LogitRows logits;
  std::vector<int64_t> active;  // rows that count
  const char* embedding;
  int64_t stride;  // in elements
  int64_t width;
  size_t element_size;
  ElementType type;
  const char* mask_embedding;
  double temperature;
  int64_t top_k;  // 0: all
  double top_p;   // 1: all
  double mix;
  double most_entropy;  // of any distribution
  char* out;

  char* out_row(int64_t row) const { return out + static_cast<size_t>(row * width) * element_size; }
};

void fill_nan(const Problem& problem, int64_t row) {
  void* out = problem.out_row(row);
  if (problem.type == ElementType::kDouble) {
    std::fill_n(static_cast<double*>(out), problem.width, std::numeric_limits<double>::quiet_NaN());
  } else if (problem.type == ElementType::kFloat) {
    std::fill_n(static_cast<float*>(out), problem.width, std::numeric_limits<float>::quiet_NaN());
  } else {
    const uint16_t nan = problem.type == ElementType::kHalf ? 0x7e00 : 0x7fc0;
    std::fill_n(static_cast<uint16_t*>(out), problem.width, nan);
  }
}

// What a thread needs for a row, allocated once. Not initialised: of most of it no page is touched.
struct Scratch {
  std::unique_ptr<float[]> logits;
  std::unique_ptr<float[]> weights;
  std::unique_ptr<int64_t[]> ids;
  std::unique_ptr<float[]> sum;

  explicit Scratch(const Problem& problem)
      : logits(new float[static_cast<size_t>(problem.logits.vocab)]),
        weights(new float[static_cast<size_t>(problem.logits.vocab)]),
        ids(new int64_t[static_cast<size_t>(problem.logits.vocab)]),
        sum(new float[static_cast<size_t>(problem.width)]) {}
};

void embed_row(const Problem& problem, int64_t row, const LogitBlockSums* sums, Scratch& scratch) {
  const LogitRows& logits = problem.logits;
  const LogitDistribution full = merge_blocks(logits, sums, problem.temperature);
  if (full.nan || !std::isfinite(full.reference)) return fill_nan(problem, row);
  const auto reference = static_cast<float>(full.reference);
  Truncation kept = {-std::numeric_limits<float>::infinity(), 0, -1};
  if (problem.top_k > 0 || problem.top_p < 1.0) {
    WINNOW_SIMD(find_truncation)
    (logits, row, reference, problem.temperature, problem.top_k, problem.top_p, full.mass,
     scratch.logits.get(), &kept);
  }
  int64_t count = 0;
  WINNOW_SIMD(collect_kept)
  (logits, row, reference, problem.temperature, kept, scratch.ids.get(), scratch.weights.get(),
   &count);
  const double mass = std::accumulate(scratch.weights.get(), scratch.weights.get() + count, 0.0);
  const double share = mixing_share(problem.mix, full.entropy(), problem.most_entropy);
  WINNOW_SIMD(mix_rows)
  (problem.type, problem.embedding, problem.stride, problem.width, scratch.ids.get(),
   scratch.weights.get(), share > 0.0 ? count : 0, static_cast<float>(share / mass),
   problem.mask_embedding, static_cast<float>(1.0 - share), scratch.sum.get(),
   problem.out_row(row));
}

void run(const Problem& problem) {
  const auto count = static_cast<int64_t>(problem.active.size());
  const int64_t blocks = logit_blocks(problem.logits.start, problem.logits.vocab);
  std::vector<LogitBlockSums> sums(static_cast<size_t>(count * blocks));
  const auto scan = WINNOW_SIMD(scan_logit_blocks);
  parallel_for(0, count * blocks, 32, [&](int64_t begin, int64_t end) {
    scan(problem.logits, problem.active.data(), begin, end - begin, problem.temperature,
         problem.temperature, sums.data() + begin);
  });
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(problem);
    for (int64_t a = begin; a < end; ++a) {
      embed_row(problem, problem.active[static_cast<size_t>(a)], sums.data() + a * blocks, scratch);
    }
  });
}

// The definition in double, by sorting.
void embed_double_row(const Problem& problem, int64_t row) {
  const double* x = static_cast<const double*>(problem.logits.logits) + row * problem.logits.stride;
  const auto vocab = static_cast<size_t>(problem.logits.vocab);
  const bool nan = std::any_of(x, x + vocab, [](double logit) { return std::isnan(logit); });
  const double top = nan || vocab == 0 ? std::numeric_limits<double>::quiet_NaN()
                                       : *std::max_element(x, x + vocab);
  if (!std::isfinite(top)) return fill_nan(problem, row);
  std::vector<double> weight(vocab);
  double mass = 0.0;
  double moment = 0.0;
  for (size_t v = 0; v < vocab; ++v) {
    const double t = (x[v] - top) / problem.temperature;
    weight[v] = std::exp(t);
    mass += weight[v];
    if (weight[v] > 0.0) moment += t * weight[v];
  }
  std::vector<size_t> order(vocab);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return x[a] > x[b]; });
  if (problem.top_k > 0) order.resize(std::min(vocab, static_cast<size_t>(problem.top_k)));
  double kept = 0.0;
  for (const size_t v : order) kept += weight[v];
  if (problem.top_p < 1.0) {
    const double wanted = problem.top_p * kept;
    kept = weight[order[0]];
    size_t nucleus = 1;
    while (nucleus < order.size() && kept < wanted) kept += weight[order[nucleus++]];
    order.resize(nucleus);
  }
  const double share =
      mixing_share(problem.mix, std::log(mass) - moment / mass, problem.most_entropy);
  const auto* embedding = reinterpret_cast<const double*>(problem.embedding);
  const auto* base = reinterpret_cast<const double*>(problem.mask_embedding);
  auto* out = reinterpret_cast<double*>(problem.out_row(row));
  for (int64_t e = 0; e < problem.width; ++e) out[e] = share < 1.0 ? (1.0 - share) * base[e] : 0.0;
  if (!(share > 0.0)) return;
  for (const size_t v : order) {
    if (!(weight[v] > 0.0)) continue;
    const double w = share * weight[v] / kept;
    const double* from = embedding + static_cast<int64_t>(v) * problem.stride;
    for (int64_t e = 0; e < problem.width; ++e) out[e] += w * from[e];
  }
}

Tensor soft_embedding(const Tensor& logits, const Tensor& embedding, const Tensor& mask_embedding,
                      const std::optional<Tensor>& mask, double temperature,
                      std::optional<int64_t> top_k, std::optional<double> top_p, double mix) {
  check_cpu("logits", logits);
  check_cpu("embedding", embedding);
  check_cpu("mask_embedding", mask_embedding);
  if (mask) check_cpu("mask", *mask);
  check_soft_embedding(logits, embedding, mask_embedding, mask, temperature, top_k, top_p, mix);

  const Rows rows = as_rows(logits);
  Shape out_shape = leading_shape(logits);
  out_shape.push_back(embedding.size(1));
  const Tensor out = empty(out_shape, embedding.scalar_type(), embedding);

  Problem problem = {};
  problem.logits = {rows.tensor.data_ptr(), rows.stride, nullptr, 0,           1.0,
                    element_type(logits),   nullptr,     0,       rows.length, 0};
  problem.embedding = static_cast<const char*>(embedding.data_ptr());
  problem.stride = embedding.stride(0);
  problem.width = embedding.size(1);
  problem.element_size = static_cast<size_t>(embedding.element_size());
  problem.type = element_type(embedding);
  problem.mask_embedding = static_cast<const char*>(mask_embedding.data_ptr());
  problem.temperature = temperature > 0.0 ? temperature : 1.0;
  problem.top_k = temperature == 0.0 ? 1 : top_k.value_or(0);
  if (problem.top_k >= rows.length) problem.top_k = 0;
  problem.top_p = top_p.value_or(1.0);
  problem.mix = mix;
  problem.most_entropy = std::log(static_cast<double>(rows.length));
  problem.out = static_cast<char*>(out.data_ptr());

  const Tensor counts = mask ? dense(*mask) : out;
  for (int64_t r = 0; r < rows.count; ++r) {
    if (!mask || static_cast<const bool*>(counts.data_ptr())[r]) {
      problem.active.push_back(r);
    } else {
      std::memset(problem.out_row(r), 0, static_cast<size_t>(problem.width) * problem.element_size);
    }
  }
  if (problem.type != ElementType::kDouble) {
    run(problem);
    return out;
  }
  const auto count = static_cast<int64_t>(problem.active.size());
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t a = begin; a < end; ++a) {
      embed_double_row(problem, problem.active[static_cast<size_t>(a)]);
    }
  });
  return out;
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("soft_embedding", TORCH_BOX(&winnow::soft_embedding));
}
