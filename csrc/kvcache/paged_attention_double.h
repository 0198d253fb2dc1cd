// The bias of a tile's keys, and paged attention in float64 by the definition. Included by
// *_simd.cc only.
#pragma once

#include <limits>

#include "common/dispatch_simd.h"
#include "kvcache/page_walk.h"
#include "kvcache/tile_lanes.h"

namespace winnow::CPU_CAPABILITY {
namespace {

void load_bias(const PagedAttention& call, const Tile& tile, int64_t head, float* bias) {
  dispatch_element(call.bias_type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, double>) {
      const T* from = static_cast<const T*>(call.key_bias) + tile.block * call.bias_stride[0] +
                      head * call.bias_stride[1] + tile.slot * call.bias_stride[2];
      int64_t j = 0;
      if (call.bias_stride[2] == 1) {
        for (; j + kWide <= tile.keys; j += kWide) store_part(bias + j, load_part(from + j));
      }
      for (; j < tile.keys; ++j) bias[j] = load_part(from + j * call.bias_stride[2], 1)[0];
    }
  });
}

// float64, for checking gradients and definitions: one row and one key at a time.
void run_double(const PagedAttention& call, const PagedAttentionTask& task, double* sums) {
  const double none = -std::numeric_limits<double>::infinity();
  const int64_t heads = call.key_heads * call.group;
  for (int64_t r = 0; r < task.rows; ++r) {
    const int64_t row = task.first_row + r;
    const int64_t head = task.key_head * call.group + row % call.group;
    const int64_t t = row / call.group;
    const double* q = static_cast<const double*>(call.query) + task.batch * call.query_stride[0] +
                      head * call.query_stride[1] + t * call.query_stride[2];
    const Span span = span_of(call, call.seq_lens[task.batch], row);
    double top = none;
    double total = 0.0;
    for (int64_t d = 0; d < call.value_dim; ++d) sums[d] = 0.0;
    Walk walk(call, task);
    Tile tile;
    while (walk.next(&tile)) {
      float bias[kKeys];
      const auto* wide_bias = static_cast<const double*>(call.key_bias);
      const bool narrow = call.key_bias && call.bias_type != ElementType::kDouble;
      if (narrow) load_bias(call, tile, task.key_head, bias);
      for (int64_t j = 0; j < tile.keys; ++j) {
        if (!span.has(tile.position + j)) continue;
        const double* k = key_row<double>(call, tile, task.key_head) + j * call.key_stride[2];
        double score = 0.0;
        for (int64_t d = 0; d < call.head_dim; ++d) score += q[d] * k[d];
        score *= call.scale;
        double extra = 0.0;
        if (narrow) {
          extra = static_cast<double>(bias[j]);
        } else if (wide_bias) {
          extra = wide_bias[tile.block * call.bias_stride[0] + task.key_head * call.bias_stride[1] +
                            (tile.slot + j) * call.bias_stride[2]];
        }
        score += extra;
        if (extra == none || score == none) continue;
        const double* v = value_row<double>(call, tile, task.key_head) + j * call.value_stride[2];
        const double highest = score > top ? score : top;
        const double shift = highest == none ? 0.0 : highest;  // a NaN score leaves no maximum
        const double shrink = top == highest ? 1.0 : __builtin_exp(top - shift);
        const double weight = __builtin_exp(score - shift);
        for (int64_t d = 0; d < call.value_dim; ++d) sums[d] = sums[d] * shrink + weight * v[d];
        total = total * shrink + weight;
        top = highest;
      }
    }
    const int64_t index = (task.batch * heads + head) * call.queries + t;
    double* out = static_cast<double*>(call.out) + index * call.value_dim;
    const double factor = total == 0.0 ? 0.0 : 1.0 / total;
    for (int64_t d = 0; d < call.value_dim; ++d) out[d] = sums[d] * factor;
    static_cast<double*>(call.lse)[index] = total == 0.0 ? none : top + __builtin_log(total);
  }
}

}  // namespace
}  // namespace winnow::CPU_CAPABILITY
