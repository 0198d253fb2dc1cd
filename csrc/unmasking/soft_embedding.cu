// winnow::soft_embedding on the GPU: the slices' sums and the truncation of logit_stats, then a
// block for each row and 1024 columns, which lists the kept tokens slice by slice and adds up their
// embeddings. Three launches; two without top-k and top-p.
#include <cmath>
#include <optional>
#include <type_traits>

#include "unmasking/logit_truncation_kernel.cuh"
#include "unmasking/measure_rows.cuh"
#include "unmasking/soft_embedding.h"

namespace winnow {
namespace {

constexpr int kColumns = 4;  // of a thread; kThreads apart

// What is written in the embedding's dtype, as one kernel serves all; one of the pointers is set.
struct Mixed {
  Global<float> single;
  Global<c10::BFloat16> brain;
  Global<c10::Half> half;
  Global<double> wide;

  template <typename Real>
  WINNOW_DEVICE void store(int64_t i, Real x) const {
    if (single) {
      single[i] = static_cast<float>(x);
    } else if (brain) {
      brain[i] = static_cast<c10::BFloat16>(static_cast<float>(x));
    } else if (half) {
      half[i] = static_cast<c10::Half>(static_cast<float>(x));
    } else {
      wide[i] = static_cast<double>(x);
    }
  }
};

template <typename Real>
struct Mixture {
  LogitSource<Real> embedding;
  int64_t stride;
  int64_t width;
  LogitSource<Real> mask_embedding;
  double temperature;
  double mix;
  double most_entropy;  // of any distribution
  Mixed out;
};

struct KeptToken {
  int64_t id;
  double weight;
};

template <typename Real>
WINNOW_KERNEL(kThreads)
mix_rows(LogitView<Real> view, Mixture<Real> mixture, Global<const SliceSums> blocks,
         Global<const Truncation> truncations, Global<const Sums> kept_sums) {
  WINNOW_SHARED(TopTwo, top_scratch, kThreads / kWarp);
  WINNOW_SHARED(Sums, sum_scratch, kThreads / kWarp);
  WINNOW_SHARED(int, count_scratch, kThreads / kWarp);
  WINNOW_SHARED(KeptToken, list, kThreads);
  const int64_t row = block_index();
  const int64_t first_column = block_index_y() * kThreads * kColumns + thread_index();
  const auto put = [&](int c, Real value) {
    const int64_t column = first_column + c * kThreads;
    if (column < mixture.width) mixture.out.store(row * mixture.width + column, value);
  };
  if (skips(view, row)) {
    for (int c = 0; c < kColumns; ++c) put(c, Real(0));
    return;
  }
  const int64_t count = view.blocks();
  const Distribution full = merge_row(blocks + row * count, count, mixture.temperature,
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
  Real sum[kColumns] = {};
  for (int64_t slice = 0; slice * kSlice < view.vocab && share > 0.0; ++slice) {
    Real x[kPerThread];
    load_plain_slice(view, row, slice, x);
    int mine = 0;
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      const int64_t index = slice * kSlice + within_slice<Real>(e);
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
              KeptToken{slice * kSlice + within_slice<Real>(e), static_cast<double>(exp2_of(x[e]))};
        }
        ++at;
      }
      block_sync();
      const int listed = all - begin < kThreads ? all - begin : kThreads;
      for (int i = 0; i < listed; ++i) {
        const KeptToken token = list[i];
        for (int c = 0; c < kColumns; ++c) {
          const int64_t column = first_column + c * kThreads;
          if (column >= mixture.width) break;
          const Real value = mixture.embedding[token.id * mixture.stride + column];
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
      const Real base = mixture.mask_embedding[column];
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
  Shape out_shape = leading_shape(logits);
  out_shape.push_back(embedding.size(1));
  const Tensor out = empty(out_shape, embedding.scalar_type(), embedding);

  LogitArguments call = {};
  call.rows = rows;
  if (mask) call.mask = dense(*mask);
  call.options = logit_options(temperature, false, false);
  call.options.top_k = temperature == 0.0 ? 1 : top_k.value_or(0);
  if (call.options.top_k >= rows.length) call.options.top_k = 0;
  call.options.top_p = top_p.value_or(1.0);
  const RowSums sums = sum_rows(call, logits, stream);
  Mixed mixed = {};
  dispatch_floating(out, [&](auto zero) {
    using E = decltype(zero);
    const auto pointer = global<E>(out);
    if constexpr (std::is_same_v<E, float>) {
      mixed.single = pointer;
    } else if constexpr (std::is_same_v<E, c10::BFloat16>) {
      mixed.brain = pointer;
    } else if constexpr (std::is_same_v<E, c10::Half>) {
      mixed.half = pointer;
    } else {
      mixed.wide = pointer;
    }
  });
  dispatch_real(embedding, [&](auto zero) {
    using Real = decltype(zero);
    LogitView<Real> view = view_of<Real>(rows);
    if (call.mask) view.mask = global<const bool>(*call.mask);
    const Mixture<Real> mixture = {source_of<Real>(embedding),
                                   embedding.stride(0),
                                   embedding.size(1),
                                   source_of<Real>(mask_embedding),
                                   call.options.temperature,
                                   mix,
                                   std::log(static_cast<double>(rows.length)),
                                   mixed};
    const bool truncates = call.options.truncates();
    launch("soft_embedding", mix_rows<Real>,
           {rows.count, ceil_div<int64_t>(embedding.size(1), kThreads * kColumns)}, kThreads,
           stream, view, mixture, global<SliceSums>(sums.blocks),
           truncates ? global<Truncation>(sums.truncations) : Global<Truncation>(nullptr),
           global<Sums>(sums.kept));
  });
  return out;
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("soft_embedding", TORCH_BOX(&winnow::soft_embedding_cuda));
}
