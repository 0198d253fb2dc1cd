// winnow::soft_embedding on the GPU: the slices' sums and the truncation of logit_stats, then a
// block for each row and 1024 columns, which lists the kept tokens slice by slice and adds up their
// embeddings. Three launches; two without top-k and top-p.
#include <cmath>
#include <optional>
#include <type_traits>

#include "unmasking/logit_truncation_kernel.cuh"
#include "unmasking/soft_embedding.h"

namespace winnow {
namespace {

constexpr int64_t kMostVocab = int64_t{1} << 19;  // what masses in fixed point hold
constexpr int kColumns = 4;                       // of a thread; kThreads apart

template <typename E>
struct Mixture {
  Global<const E> embedding;
  int64_t stride;
  int64_t width;
  Global<const E> mask_embedding;
  double temperature;
  double mix;
  double most_entropy;  // of any distribution
  Global<E> out;
};

struct KeptToken {
  int64_t id;
  double weight;
};

template <typename T, typename Real, typename E>
WINNOW_KERNEL(kThreads)
mix_rows(LogitView<T, Real> view, Mixture<E> mixture, Global<const SliceSums> slices,
         Global<const Truncation> truncations, Global<const Sums> kept_sums) {
  WINNOW_SHARED(uint32_t, bits, kThreads);
  WINNOW_SHARED(TopTwo, top_scratch, kThreads / kWarp);
  WINNOW_SHARED(Sums, sum_scratch, kThreads / kWarp);
  WINNOW_SHARED(int, count_scratch, kThreads / kWarp);
  WINNOW_SHARED(KeptToken, list, kThreads);
  const int64_t row = block_index();
  const int64_t first_column = block_index_y() * kThreads * kColumns + thread_index();
  const auto put = [&](int c, Real value) {
    const int64_t column = first_column + c * kThreads;
    if (column < mixture.width) {
      mixture.out[row * mixture.width + column] = static_cast<E>(value);
    }
  };
  if (skips(view, row)) {
    for (int c = 0; c < kColumns; ++c) put(c, Real(0));
    return;
  }
  const int64_t count = ceil_div<int64_t>(view.vocab, kSlice);
  const Distribution full = merge_row(slices + row * count, count, mixture.temperature,
                                      Shared<TopTwo>(top_scratch), Shared<Sums>(sum_scratch));
  const double infinity = std::numeric_limits<double>::infinity();
  if (full.top.nan != 0 || full.top.first == infinity || full.top.first == -infinity) {
    for (int c = 0; c < kColumns; ++c) put(c, std::numeric_limits<Real>::quiet_NaN());
    return;
  }
  Truncation kept = keep_all();
  double mass = full.mass;
  if (truncations) {
    kept = truncations[row];
    Sums sums = {0.0, 0.0, 0.0};
    for (int64_t s = thread_index(); s < count; s += kThreads) {
      const Sums slice = kept_sums[row * count + s];
      sums = add_sums(sums, slice);
    }
    mass = block_reduce<kThreads>(sums, Shared<Sums>(sum_scratch), add_sums).mass;
  }
  const double share =
      mixing_share(mixture.mix, log(full.mass) - full.moment / full.mass, mixture.most_entropy);

  const Real reference = static_cast<Real>(full.top.first);
  const Real scale = exponent_scale<Real>(mixture.temperature);
  constexpr int N = 16 / sizeof(T);
  Real sum[kColumns] = {};
  for (int64_t slice = 0; slice < count && share > 0.0; ++slice) {
    Real x[kPerThread];
    load_slice(view, row, slice, Shared<uint32_t>(bits), x);
    int mine = 0;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      const int64_t index = slice * kSlice + within_slice<N>(e);
      // What is not kept, or too small, becomes -infinity.
      const Real t = x[e] == reference ? Real(0) : (x[e] - reference) * scale;
      if (!keeps(kept, x[e], index) || !(exp2_of(t) > Real(0))) {
        x[e] = -std::numeric_limits<Real>::infinity();
      } else {
        x[e] = t;
        ++mine;
      }
    }
    int all = 0;
    const int start = block_scan<kThreads>(mine, Shared<int>(count_scratch), &all);
    for (int begin = 0; begin < all; begin += kThreads) {
      int at = start - begin;
#pragma unroll
      for (int e = 0; e < kPerThread; ++e) {
        if (x[e] == -std::numeric_limits<Real>::infinity()) continue;
        if (at >= 0 && at < kThreads) {
          list[at] =
              KeptToken{slice * kSlice + within_slice<N>(e), static_cast<double>(exp2_of(x[e]))};
        }
        ++at;
      }
      block_sync();
      const int listed = all - begin < kThreads ? all - begin : kThreads;
      for (int i = 0; i < listed; ++i) {
        const KeptToken token = list[i];
        const auto from = mixture.embedding + token.id * mixture.stride;
        for (int c = 0; c < kColumns; ++c) {
          const int64_t column = first_column + c * kThreads;
          if (column >= mixture.width) break;
          const Real value = static_cast<Real>(static_cast<E>(from[column]));
          sum[c] = fma(static_cast<Real>(token.weight), value, sum[c]);
        }
      }
      block_sync();
    }
  }
  for (int c = 0; c < kColumns; ++c) {
    const int64_t column = first_column + c * kThreads;
    if (column >= mixture.width) break;
    Real value = sum[c] * static_cast<Real>(share / mass);
    if (share < 1.0) {
      const Real base = static_cast<Real>(static_cast<E>(mixture.mask_embedding[column]));
      value = fma(static_cast<Real>(1.0 - share), base, value);
    }
    put(c, value);
  }
}

Tensor soft_embedding_cuda(const Tensor& logits, const Tensor& embedding,
                           const Tensor& mask_embedding, const std::optional<Tensor>& mask,
                           double temperature, std::optional<int64_t> top_k,
                           std::optional<double> top_p, double mix) {
  check_device("logits", logits);
  check_device("embedding", embedding);
  check_device("mask_embedding", mask_embedding);
  if (mask) check_device("mask", *mask);
  check_soft_embedding(logits, embedding, mask_embedding, mask, temperature, top_k, top_p, mix);

  const Stream stream(logits);
  const Rows rows = as_rows(logits);
  std::optional<Tensor> dense_mask;
  if (mask) dense_mask = torch::stable::contiguous(*mask);
  Shape out_shape = leading_shape(logits);
  out_shape.push_back(embedding.size(1));
  const Tensor out = empty(out_shape, embedding.scalar_type(), embedding);

  const double divisor = temperature > 0.0 ? temperature : 1.0;
  int64_t limit = temperature == 0.0 ? 1 : top_k.value_or(0);
  if (limit >= rows.length) limit = 0;
  const double share = top_p.value_or(1.0);
  const bool truncates = limit > 0 || share < 1.0;
  WINNOW_CHECK(share == 1.0 || rows.length <= kMostVocab,
               "top_p: expected a vocabulary of at most ", kMostVocab, " tokens on the GPU, got ",
               rows.length);
  const int64_t slices = ceil_div<int64_t>(rows.length, kSlice);
  const auto workspace = [&](int64_t count, size_t bytes) {
    return empty({count, static_cast<int64_t>(bytes / sizeof(double))}, ScalarType::Double, logits);
  };
  const Tensor sums = workspace(rows.count * slices, sizeof(SliceSums));
  const Tensor truncations = workspace(truncates ? rows.count : 0, sizeof(Truncation));
  const Tensor kept = workspace(truncates ? rows.count * slices : 0, sizeof(Sums));
  dispatch_floating(logits, [&](auto of_logits) {
    using T = decltype(of_logits);
    using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
    LogitView<T, Real> view = {};
    view.logits = global<const T>(rows.tensor);
    view.stride = rows.stride;
    view.vectors = reinterpret_cast<uintptr_t>(rows.tensor.data_ptr()) % 16 == 0 &&
                   (rows.count <= 1 || rows.stride * sizeof(T) % 16 == 0);
    view.vocab = rows.length;
    if (dense_mask) view.mask = global<const bool>(*dense_mask);
    const auto slice_sums = global<SliceSums>(sums);
    launch("soft_embedding", scan_slices<T, Real>, Grid{rows.count, slices}, kThreads, stream, view,
           divisor, divisor, slice_sums);
    Global<Truncation> truncation = {};
    Global<Sums> kept_sums = {};
    if (truncates) {
      truncation = global<Truncation>(truncations);
      kept_sums = global<Sums>(kept);
      launch("soft_embedding", truncate_rows<T, Real>, Grid{rows.count}, kThreads, stream, view,
             divisor, divisor, limit, share, -std::numeric_limits<double>::infinity(), slice_sums,
             truncation, kept_sums);
    }
    dispatch_floating(embedding, [&](auto of_embedding) {
      using E = decltype(of_embedding);
      if constexpr (std::is_same_v<T, double> == std::is_same_v<E, double>) {
        const Mixture<E> mixture = {global<const E>(embedding),
                                    embedding.stride(0),
                                    embedding.size(1),
                                    global<const E>(mask_embedding),
                                    divisor,
                                    mix,
                                    std::log(static_cast<double>(rows.length)),
                                    global<E>(out)};
        launch("soft_embedding", mix_rows<T, Real, E>,
               Grid{rows.count, ceil_div<int64_t>(embedding.size(1), kThreads * kColumns)},
               kThreads, stream, view, mixture, slice_sums, truncation, kept_sums);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("soft_embedding", TORCH_BOX(&winnow::soft_embedding_cuda));
}
