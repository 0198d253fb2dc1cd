// winnow::paged_attention on the GPU: checks, the split of the work, launches. Shapes alone decide
// the split, because lengths and lists stay on the device; what they hold is not checked, but a
// block outside of the pages is never read.
#include <algorithm>
#include <optional>
#include <tuple>

#include "kvcache/paged_attention_arguments.h"
#include "kvcache/paged_attention_kernel.cuh"

namespace winnow {
namespace {

constexpr int64_t kSplitKeys = 256;     // of one warp; 32k keys of 8 heads fill 132 SMs
constexpr int64_t kMostSplitRows = 16;  // more query rows fill the GPU by themselves
constexpr int64_t kMostDim = 256;

template <int kElements, int N, int kRows, int kSteps, typename T, typename Real>
void run(PagedCall<T, Real>& call, const Tensor& query, const Stream& stream) {
  const int64_t pairs = call.batch * call.key_heads;
  const int64_t rows = call.queries * call.group;
  call.splits = 1;
  call.split_entries = call.entries;
  if (rows <= kMostSplitRows) {
    call.split_entries = call.block_size >= kSplitKeys ? 1 : kSplitKeys / call.block_size;
    call.splits = call.entries > 0 ? ceil_div(call.entries, call.split_entries) : 1;
  }
  call.tasks = pairs * ceil_div<int64_t>(rows, kRows) * call.splits;
  const bool splits = call.splits > 1;
  const int64_t parts = splits ? pairs * rows * call.splits : 0;
  const ScalarType dtype = statistics_dtype(query);
  const Tensor partial_out = empty({parts, call.value_dim}, dtype, query);
  const Tensor partial_lse = empty({parts}, dtype, query);
  call.partial_out = global<Real>(partial_out);
  call.partial_lse = global<Real>(partial_lse);
  launch("paged_attention", attend<T, Real, kElements, N, kRows, kSteps>,
         {ceil_div<int64_t>(call.tasks, kWarps)}, kThreads, stream, call);
  if (splits) {
    launch("paged_attention", merge_splits<T, Real>, {ceil_div<int64_t>(pairs * rows, kWarps)},
           kThreads, stream, call, pairs);
  }
}

// Whether rows of n elements can be read N at a time.
template <int N>
bool aligned(const Tensor& tensor) {
  const auto bytes = static_cast<int64_t>(N * tensor.element_size());
  bool fits = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % static_cast<uint64_t>(bytes) == 0;
  fits = fits && tensor.size(3) % N == 0;
  for (int64_t d = 0; d < 3; ++d) fits = fits && (tensor.size(d) <= 1 || tensor.stride(d) % N == 0);
  return fits;
}

// The memory of a floating tensor, whatever its dtype.
template <typename Memory>
AnyFloating<Memory> any_floating(const Tensor& tensor) {
  AnyFloating<Memory> any = {};
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      any.as_float = global<typename AnyFloating<Memory>::template Like<float>>(tensor);
      break;
    case ScalarType::BFloat16:
      any.as_bfloat16 = global<typename AnyFloating<Memory>::template Like<c10::BFloat16>>(tensor);
      break;
    default:
      any.as_half = global<typename AnyFloating<Memory>::template Like<c10::Half>>(tensor);
  }
  return any;
}

template <typename T, typename Real>
void pick(PagedCall<T, Real>& call, const Tensor& query, const Tensor& key_pages,
          const Tensor& value_pages, const Stream& stream) {
  const int64_t dim = call.head_dim > call.value_dim ? call.head_dim : call.value_dim;
  constexpr int N = 16 / sizeof(T);
  // As many rows and steps as fit 255 registers without spilling.
  constexpr int kSteps = sizeof(T) == 2 ? 4 : 2;
  if constexpr (std::is_same_v<T, double>) {
    return run<32, 1, 1, 1>(call, query, stream);
  } else if constexpr (kCoded<T>) {
    // Queries are read one by one, so that only the pages have to be aligned.
    if (dim <= 64 && aligned<8>(key_pages) && aligned<8>(value_pages)) {
      return run<8, 8, 4, 4>(call, query, stream);
    }
    if (!aligned<16>(key_pages) || !aligned<16>(value_pages)) {
      return run<32, 1, 1, 2>(call, query, stream);
    }
    if (dim <= 128) return run<16, 16, 4, 2>(call, query, stream);
    return run<32, 16, 2, 2>(call, query, stream);
  } else {
    if (!aligned<N>(query) || !aligned<N>(key_pages) || !aligned<N>(value_pages)) {
      return run<32, 1, 1, 2>(call, query, stream);
    }
    if (dim <= 64) return run<8, N, 4, 4>(call, query, stream);
    if (dim <= 128) return run<16, N, 4, kSteps>(call, query, stream);
    return run<32, N, 2, kSteps / 2>(call, query, stream);
  }
}

KeyBias key_bias_of(const std::optional<Tensor>& bias, const Tensor& key_pages,
                    const Tensor& query) {
  KeyBias result = {};
  if (!bias) return result;
  check_key_bias(*bias, key_pages, query, check_device, result.stride);
  switch (bias->scalar_type()) {
    case ScalarType::Float:
      result.as_float = global<const float>(*bias);
      break;
    case ScalarType::BFloat16:
      result.as_bfloat16 = global<const c10::BFloat16>(*bias);
      break;
    case ScalarType::Half:
      result.as_half = global<const c10::Half>(*bias);
      break;
    default:
      result.as_double = global<const double>(*bias);
  }
  return result;
}

std::tuple<Tensor, Tensor> paged_attention_cuda(
    const Tensor& query, const Tensor& key_pages, const Tensor& value_pages,
    const Tensor& block_table, const Tensor& seq_lens, bool causal,
    std::optional<Tensor> block_indices, std::optional<int64_t> window, int64_t sinks,
    std::optional<Tensor> key_bias, std::optional<double> scale, std::optional<Tensor> key_scales,
    std::optional<Tensor> value_scales) {
  check_query(query, check_device);
  const bool quantised =
      check_pages_and_scales(query, key_pages, value_pages, key_scales, value_scales, check_device);
  check_query_and_keys(query, key_pages, block_table, seq_lens, window, sinks, check_device);
  const int64_t batch = query.size(0);
  const int64_t heads = query.size(1);
  const int64_t queries = query.size(2);
  const int64_t head_dim = query.size(3);
  const int64_t value_dim = value_pages.size(3);
  const int64_t key_heads = key_pages.size(1);
  WINNOW_CHECK(head_dim <= kMostDim, "query: expected a head dimension of at most ", kMostDim,
               ", got ", shape_of(query));
  WINNOW_CHECK(value_dim <= kMostDim, "value_pages: expected a head dimension of at most ",
               kMostDim, ", got ", shape_of(value_pages));
  const bool shared =
      block_indices && check_block_indices(*block_indices, batch, key_heads, check_device);
  const Stream stream(query);
  const KeyBias bias = key_bias_of(key_bias, key_pages, query);
  Tensor out = empty({batch, heads, queries, value_dim}, query.scalar_type(), query);
  Tensor lse = empty({batch, heads, queries}, statistics_dtype(query), query);
  if (lse.numel() == 0) return {out, lse};
  const auto attend_pages = [&](auto zero) {
    using T = decltype(zero);
    using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;
    PagedCall<T, Real> call = {};
    if constexpr (kCoded<T>) {
      call.query = any_floating<const float>(query);
      call.out = any_floating<float>(out);
      call.key_scales = global<const float>(*key_scales);
      call.value_scales = global<const float>(*value_scales);
      for (int64_t d = 0; d < 2; ++d) {
        call.key_scale_stride[d] = key_scales->stride(d);
        call.value_scale_stride[d] = value_scales->stride(d);
      }
    } else {
      call.query = global<const T>(query);
      call.out = global<T>(out);
    }
    call.key_pages = global<const T>(key_pages);
    call.value_pages = global<const T>(value_pages);
    for (int64_t d = 0; d < 3; ++d) {
      call.query_stride[d] = query.stride(d);
      call.key_stride[d] = key_pages.stride(d);
      call.value_stride[d] = value_pages.stride(d);
    }
    call.block_table = global<const int32_t>(block_table);
    call.table_stride = block_table.stride(0);
    call.table_width = block_table.size(1);
    call.seq_lens = global<const int32_t>(seq_lens);
    call.entries = block_table.size(1);
    if (block_indices) {
      call.block_indices = global<const int32_t>(*block_indices);
      call.indices_stride[0] = block_indices->stride(0);
      call.indices_stride[1] = shared ? 0 : block_indices->stride(1);
      call.entries = block_indices->size(block_indices->dim() - 1);
    }
    call.key_bias = bias;
    call.num_blocks = key_pages.size(0);
    call.block_size = key_pages.size(2);
    call.batch = batch;
    call.key_heads = key_heads;
    call.group = heads / key_heads;
    call.queries = queries;
    call.head_dim = head_dim;
    call.value_dim = value_dim;
    call.mask = {causal, window ? std::min(*window, kUnbounded) : 0, std::min(sinks, kUnbounded)};
    call.scale = static_cast<Real>(score_scale(scale, head_dim) * 1.4426950408889634);
    call.lse = global<Real>(lse);
    pick(call, query, key_pages, value_pages, stream);
  };
  if (!quantised) {
    dispatch_floating(query, attend_pages);
  } else {
    dispatch_codes(code_type("key_pages", key_pages), attend_pages);
  }
  return {out, lse};
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("paged_attention", TORCH_BOX(&winnow::paged_attention_cuda));
}
