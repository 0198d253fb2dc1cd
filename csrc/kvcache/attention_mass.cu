// winnow::attention_mass on the GPU. A warp takes four keys of a key head, lanes side by side along
// D, and meets the query rows that may see them one after another; exp(score - lse) adds up in one
// order. Traffic: each key once, the queries of a key head from the caches. Nothing of the size of
// the attention matrix.
#include <algorithm>
#include <optional>

#include "kvcache/block_table.cuh"
#include "kvcache/paged_attention_arguments.h"

namespace winnow {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kKeys = 4;                     // of a warp
constexpr int64_t kMostDim = 256;            // as paged_attention, which gives the lse
constexpr int kElements = kMostDim / kWarp;  // of a key in a lane

template <typename T, typename Real>
struct Mass {
  Global<const T> query;
  int64_t query_stride[3];  // batch, head, position
  Global<const T> keys;
  int64_t key_stride[3];  // block, head, slot
  Global<const int32_t> block_table;
  int64_t table_stride;
  Global<const int32_t> seq_lens;
  Global<const Real> lse;
  int64_t lse_stride[3];
  Global<const Real> key_bias;  // or null
  int64_t bias_stride[3];
  int64_t num_blocks;
  int64_t block_size;
  int64_t width;
  int64_t heads;
  int64_t group;
  int64_t queries;
  int64_t dim;
  Mask mask;
  Real scale;
  int64_t items;
  Global<Real> result;
};

WINNOW_DEVICE float exp_of(float x) {
  return fast_exp2(x * 1.4426950408889634f);
}
WINNOW_DEVICE double exp_of(double x) {
  return exp(x);
}

template <typename T, typename Real>
WINNOW_KERNEL(kThreads)
receive(Mass<T, Real> call) {
  const int64_t item = block_index() * kWarps + warp_index();
  if (item >= call.items) return;
  const int64_t tokens = call.width * call.block_size;
  const int64_t quads = ceil_div<int64_t>(tokens, kKeys);
  const int64_t start = item % quads * kKeys;
  const int64_t head = item / quads % call.heads;
  const int64_t row = item / quads / call.heads;
  const int64_t length = length_of(call.seq_lens, row, tokens);
  const Real none = -std::numeric_limits<Real>::infinity();

  Real key[kKeys][kElements];
  Real bias[kKeys];
  Real received[kKeys];
  bool there[kKeys];
#pragma unroll
  for (int n = 0; n < kKeys; ++n) {
    const int64_t j = start + n;
    int64_t block = -1;
    if (j < length) {
      block = static_cast<int32_t>(call.block_table[row * call.table_stride + j / call.block_size]);
    }
    received[n] = Real(0);
    bias[n] = Real(0);
    there[n] = block >= 0 && block < call.num_blocks;
    if (there[n] && call.key_bias) {
      bias[n] = call.key_bias[block * call.bias_stride[0] + head * call.bias_stride[1] +
                              j % call.block_size * call.bias_stride[2]];
      there[n] = bias[n] != none;
    }
    const auto from = call.keys + (there[n] ? block * call.key_stride[0] : 0) +
                      head * call.key_stride[1] + j % call.block_size * call.key_stride[2];
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int64_t d = lane_index() + e * kWarp;
      key[n][e] = Real(0);
      if (there[n] && d < call.dim) key[n][e] = static_cast<Real>(static_cast<T>(from[d]));
    }
  }
  // The first query that a causal mask lets see any of these keys.
  const int64_t before = length - call.queries;
  const int64_t first = call.mask.causal && start > before ? start - before : 0;
  for (int64_t t = start < length ? first : call.queries; t < call.queries; ++t) {
    bool seen[kKeys];
    bool any = false;
#pragma unroll
    for (int n = 0; n < kKeys; ++n) {
      seen[n] = there[n] && call.mask.sees(before + t, start + n);
      any = any || seen[n];
    }
    if (!any) continue;
    for (int64_t g = 0; g < call.group; ++g) {
      const int64_t h = head * call.group + g;
      const auto query = call.query + row * call.query_stride[0] + h * call.query_stride[1] +
                         t * call.query_stride[2];
      Real score[kKeys] = {};
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const int64_t d = lane_index() + e * kWarp;
        if (d >= call.dim) break;
        const Real q = static_cast<Real>(static_cast<T>(query[d]));
#pragma unroll
        for (int n = 0; n < kKeys; ++n) score[n] += q * key[n][e];
      }
      const Real lse =
          call.lse[row * call.lse_stride[0] + h * call.lse_stride[1] + t * call.lse_stride[2]];
#pragma unroll
      for (int n = 0; n < kKeys; ++n) {
        const Real sum = warp_reduce(score[n], [](Real a, Real b) { return a + b; });
        const Real x = sum * call.scale + bias[n];
        if (seen[n] && x != none) received[n] += exp_of(x - lse);
      }
    }
  }
  if (lane_index() != 0) return;
#pragma unroll
  for (int n = 0; n < kKeys; ++n) {
    if (start + n < tokens)
      call.result[(row * call.heads + head) * tokens + start + n] = received[n];
  }
}

// ---- launcher ----

Tensor attention_mass_cuda(const Tensor& query, const Tensor& key_pages, const Tensor& block_table,
                           const Tensor& seq_lens, const Tensor& lse, bool causal,
                           std::optional<int64_t> window, int64_t sinks,
                           std::optional<Tensor> key_bias, std::optional<double> scale) {
  check_mass(query, key_pages, block_table, seq_lens, lse, window, sinks, key_bias, check_device);
  const int64_t dim = query.size(3);
  WINNOW_CHECK(dim <= kMostDim, "query: expected a head dimension of at most ", kMostDim, ", got ",
               shape_of(query));
  const int64_t batch = query.size(0);
  const int64_t key_heads = key_pages.size(1);
  const Stream stream(query);
  const int64_t tokens = block_table.size(1) * key_pages.size(2);
  Tensor mass = empty({batch, key_heads, tokens}, statistics_dtype(query), query);
  dispatch_floating(query, [&](auto zero) {
    using T = decltype(zero);
    using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
    Mass<T, Real> call = {};
    call.query = global<const T>(query);
    call.keys = global<const T>(key_pages);
    for (int64_t d = 0; d < 3; ++d) {
      call.query_stride[d] = query.stride(d);
      call.key_stride[d] = key_pages.stride(d);
      call.lse_stride[d] = lse.stride(d);
      if (key_bias) call.bias_stride[d] = key_bias->stride(d);
    }
    call.block_table = global<const int32_t>(block_table);
    call.table_stride = block_table.stride(0);
    call.seq_lens = global<const int32_t>(seq_lens);
    call.lse = global<const Real>(lse);
    if (key_bias) call.key_bias = global<const Real>(*key_bias);
    call.num_blocks = key_pages.size(0);
    call.block_size = key_pages.size(2);
    call.width = block_table.size(1);
    call.heads = key_heads;
    call.group = key_heads > 0 ? query.size(1) / key_heads : 0;
    call.queries = query.size(2);
    call.dim = dim;
    call.mask = {causal, window ? std::min(*window, kUnbounded) : 0, std::min(sinks, kUnbounded)};
    call.scale = static_cast<Real>(score_scale(scale, dim));
    call.items = batch * key_heads * ceil_div<int64_t>(tokens, kKeys);
    call.result = global<Real>(mass);
    launch("attention_mass", receive<T, Real>, {ceil_div<int64_t>(call.items, kWarps)}, kThreads,
           stream, call);
  });
  return mass;
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("attention_mass", TORCH_BOX(&winnow::attention_mass_cuda));
}
