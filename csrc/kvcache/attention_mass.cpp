// winnow::attention_mass on the CPU. A task is all rows of a key head against a fixed number of its
// keys, so the order of the sums, and with it the result, does not depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/parallel.h"
#include "common/tensors.h"
#include "kvcache/attention_mass_simd.h"
#include "kvcache/paged_attention_call.h"

namespace winnow {
namespace {

constexpr int64_t kSplitKeys = 1024;  // their bytes stay in the L2 cache for all rows
constexpr int64_t kThreadWork = 1 << 18;

Tensor attention_mass(const Tensor& query, const Tensor& key_pages, const Tensor& block_table,
                      const Tensor& seq_lens, const Tensor& lse, bool causal,
                      std::optional<int64_t> window, int64_t sinks, std::optional<Tensor> key_bias,
                      std::optional<double> scale) {
  check_mass(query, key_pages, block_table, seq_lens, lse, window, sinks, key_bias, check_cpu);
  check_rows(key_pages, block_table, seq_lens);
  const int64_t batch = query.size(0);
  const int64_t queries = query.size(2);
  const int64_t dim = query.size(3);
  const int64_t key_heads = key_pages.size(1);
  const int64_t block_size = key_pages.size(2);
  const int64_t width = block_table.size(1);
  AttentionMass call{};
  call.attention = describe_query_and_keys(query, key_pages, block_table, seq_lens, causal, window,
                                           sinks, scale);
  if (key_bias) {
    for (int64_t d = 0; d < 3; ++d) call.bias_stride[d] = key_bias->stride(d);
    call.key_bias = key_bias->data_ptr();
  }

  Tensor mass = empty({batch, key_heads, width * block_size}, statistics_dtype(query), query);
  for (int64_t d = 0; d < 3; ++d) call.lse_stride[d] = lse.stride(d);
  call.lse = lse.data_ptr();
  call.mass = mass.data_ptr();
  call.entries = width;

  int64_t scratch_floats = 0;
  WINNOW_SIMD(attention_mass_scratch)(call, &scratch_floats);
  const int64_t split = std::max<int64_t>(1, kSplitKeys / block_size);
  const int64_t splits = (width + split - 1) / split;
  const auto run = WINNOW_SIMD(attention_mass_task);
  const int64_t work = 1 + split * block_size * queries * call.attention.group * dim;
  parallel_for(0, batch * key_heads * splits, 1 + kThreadWork / work,
               [&](int64_t begin, int64_t end) {
                 std::vector<float> scratch(static_cast<size_t>(scratch_floats));
                 for (int64_t n = begin; n < end; ++n) {
                   const int64_t first = n % splits * split;
                   run(call, n / splits / key_heads, n / splits % key_heads, first,
                       std::min(first + split, width), scratch.data());
                 }
               });
  return mass;
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_IMPL(winnow, CPU, m) {
  m.impl("attention_mass", TORCH_BOX(&winnow::attention_mass));
}
