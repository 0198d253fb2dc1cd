// The kernels of winnow::paged_attention. A warp takes up to kRows query rows of one key head
// (positions and the heads of a group packed together, so a key is read once for all of them) and a
// run of blocks: eight lanes share a key, four keys at a time, four such steps in flight. Softmax
// is online, in base 2; short queries split the keys over warps, and a second launch merges their
// partial results in a fixed order. Traffic: keys and values once per row tile, 1/64 of that for
// partial results.
#pragma once

#include <cmath>

#include "kvcache/paged_attention_call.cuh"

namespace winnow {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSharers = 8;                     // lanes per key
constexpr int kKeysAbreast = kWarp / kSharers;  // keys that a warp works on at once

WINNOW_DEVICE float exp2_of(float x) {
  return fast_exp2(x);
}
WINNOW_DEVICE double exp2_of(double x) {
  return exp2(x);
}

// A lane's share of one row of keys, values or queries, as it lies in memory: vectors of N,
// kSharers vectors apart. What lies beyond the row is zero.
template <typename T, int N, int kVectors>
struct RowShare {
  Vector<T, N> vector[kVectors];

  WINNOW_DEVICE void load(Global<const T> row, int64_t dim, int sharer) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t d = static_cast<int64_t>(v * kSharers + sharer) * N;
      if (d < dim) {
        vector[v] = load_vector<N>(row + d);
      } else {
        vector[v] = Vector<T, N>{};
      }
    }
  }
  template <typename Real>
  WINNOW_DEVICE Real element(int e) const {
    if constexpr (kCoded<T>) {
      return number_of(vector[e / N].element[e % N]);
    } else {
      return static_cast<Real>(vector[e / N].element[e % N]);
    }
  }
};

// kElements of a row are a lane's, kRows * kElements registers hold queries and as many outputs;
// kSteps groups of keys are in flight.
template <typename T, typename Real, int kElements, int N, int kRows, int kSteps>
WINNOW_KERNEL(kThreads)
attend(PagedCall<T, Real> call) {
  const int64_t task = block_index() * kWarps + warp_index();
  if (task >= call.tasks) return;
  const int64_t rows = call.queries * call.group;
  const int64_t row_tiles = ceil_div<int64_t>(rows, kRows);
  // Sequences before splits: what forks share is read by neighbouring warps, once from memory.
  const int64_t first_row = task % row_tiles * kRows;
  const int64_t batch = task / row_tiles % call.batch;
  const int64_t part = task / row_tiles / call.batch;
  const int64_t split = part % call.splits;
  const int64_t head = part / call.splits;
  const int64_t pair = batch * call.key_heads + head;
  const int sharer = lane_index() % kSharers;
  const int abreast = lane_index() / kSharers;
  const Real none = -std::numeric_limits<Real>::infinity();
  constexpr int kTile = kKeysAbreast * kSteps;  // keys between two updates of the softmax
  using Share = RowShare<T, N, kElements / N>;

  const int64_t length = length_of(call, batch);
  const int64_t entries = entries_of(call, length);
  const int64_t begin_entry = split * call.split_entries;
  if (split > 0 && !call.block_indices && begin_entry >= entries) return;  // merge skips it too
  const int64_t end_entry =
      begin_entry + call.split_entries < entries ? begin_entry + call.split_entries : entries;
  const int64_t first_position = length - call.queries + first_row / call.group;

  Real query[kRows][kElements];
  Real out[kRows][kElements];
  Real top[kRows];
  Real sum[kRows];
  int64_t position[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = first_row + r < rows ? first_row + r : rows - 1;
    const int64_t t = row / call.group;
    position[r] = length - call.queries + t;
    const int64_t at = batch * call.query_stride[0] +
                       (head * call.group + row % call.group) * call.query_stride[1] +
                       t * call.query_stride[2];
    top[r] = none;
    sum[r] = Real(0);
    if constexpr (kCoded<T>) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const int64_t d = static_cast<int64_t>(e / N * kSharers + sharer) * N + e % N;
        query[r][e] = d < call.head_dim ? call.query.at(at + d) : Real(0);
      }
    } else {
      Share share;
      share.load(call.query + at, call.head_dim, sharer);
#pragma unroll
      for (int e = 0; e < kElements; ++e) query[r][e] = share.template element<Real>(e);
    }
#pragma unroll
    for (int e = 0; e < kElements; ++e) out[r][e] = Real(0);
  }

  for (int64_t entry = begin_entry; entry < end_entry; ++entry) {
    int64_t logical = entry;
    if (call.block_indices) {
      logical = static_cast<int32_t>(call.block_indices[batch * call.indices_stride[0] +
                                                        head * call.indices_stride[1] + entry]);
    }
    const int64_t begin = logical * call.block_size;
    if (logical < 0 || begin >= length) continue;
    const int64_t end = begin + call.block_size < length ? begin + call.block_size : length;
    if (!call.mask.any_sees(first_position, position[kRows - 1], begin, end)) continue;
    const int64_t block =
        static_cast<int32_t>(call.block_table[batch * call.table_stride + logical]);
    if (block < 0 || block >= call.num_blocks) continue;  // never foreign memory
    const auto keys = call.key_pages + block * call.key_stride[0] + head * call.key_stride[1];
    const auto values =
        call.value_pages + block * call.value_stride[0] + head * call.value_stride[1];

    Real scale = call.scale;
    Real value_scale = Real(1);
    if constexpr (kCoded<T>) {
      scale *= static_cast<float>(
          call.key_scales[block * call.key_scale_stride[0] + head * call.key_scale_stride[1]]);
      value_scale =
          call.value_scales[block * call.value_scale_stride[0] + head * call.value_scale_stride[1]];
    }

    for (int64_t tile = begin; tile < end; tile += kTile) {
      Share share[kSteps];  // of the keys, then of the values
      Real score[kSteps][kRows];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int64_t j = tile + s * kKeysAbreast + abreast;
        if (j < end) share[s].load(keys + (j - begin) * call.key_stride[2], call.head_dim, sharer);
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int64_t j = tile + s * kKeysAbreast + abreast;
#pragma unroll
        for (int r = 0; r < kRows; ++r) score[s][r] = Real(0);
        if (j >= end) continue;
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          const Real key = share[s].template element<Real>(e);
#pragma unroll
          for (int r = 0; r < kRows; ++r) score[s][r] = fma(query[r][e], key, score[s][r]);
        }
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int64_t j = tile + s * kKeysAbreast + abreast;
        if (j < end) {
          share[s].load(values + (j - begin) * call.value_stride[2], call.value_dim, sharer);
        }
      }
      Real highest[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) highest[r] = top[r];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int64_t j = tile + s * kKeysAbreast + abreast;
        const Real bias =
            j < end ? call.key_bias.template at<Real>(block, head, j - begin) : Real(0);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          Real dot = score[s][r];
#pragma unroll
          for (int offset = 1; offset < kSharers; offset *= 2) {
            dot += shuffle_xor(kFullWarp, dot, offset);
          }
          // A bias of -infinity hides a key whatever the product is.
          const bool seen = j < end && call.mask.sees(position[r], j) && bias != none;
          score[s][r] = seen ? fma(bias, static_cast<Real>(1.4426950408889634), dot * scale) : none;
          highest[r] = score[s][r] > highest[r] ? score[s][r] : highest[r];
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int offset = kSharers; offset < kWarp; offset *= 2) {
          const Real other = shuffle_xor(kFullWarp, highest[r], offset);
          highest[r] = other > highest[r] ? other : highest[r];
        }
        if (highest[r] > top[r]) {
          const Real shrink = exp2_of(top[r] - highest[r]);
          top[r] = highest[r];
          sum[r] *= shrink;
#pragma unroll
          for (int e = 0; e < kElements; ++e) out[r][e] *= shrink;
        }
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        Real weight[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          weight[r] = score[s][r] == none ? Real(0) : exp2_of(score[s][r] - top[r]);
          sum[r] += weight[r];
          if constexpr (kCoded<T>) weight[r] *= value_scale;
        }
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          const Real value = share[s].template element<Real>(e);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            // Not a product with zero: a hidden value may be NaN.
            if (score[s][r] != none) out[r][e] = fma(weight[r], value, out[r][e]);
          }
        }
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int offset = kSharers; offset < kWarp; offset *= 2) {
      sum[r] += shuffle_xor(kFullWarp, sum[r], offset);
#pragma unroll
      for (int e = 0; e < kElements; ++e) out[r][e] += shuffle_xor(kFullWarp, out[r][e], offset);
    }
    const int64_t row = first_row + r;
    if (row >= rows) continue;
    const Real share = sum[r] == Real(0) ? Real(0) : Real(1) / sum[r];
    const Real lse = sum[r] == Real(0) ? none : top[r] + log2(sum[r]);
    const bool writes = abreast == 0;
    if (call.splits > 1) {
      const int64_t at = (pair * rows + row) * call.splits + split;
      if (lane_index() == 0) call.partial_lse[at] = lse;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const int64_t d = static_cast<int64_t>(e / N * kSharers + sharer) * N + e % N;
        if (writes && d < call.value_dim) {
          call.partial_out[at * call.value_dim + d] = out[r][e] * share;
        }
      }
      continue;
    }
    const int64_t at =
        (batch * call.key_heads * call.group + head * call.group + row % call.group) *
            call.queries +
        row / call.group;
    if (lane_index() == 0) call.lse[at] = lse * static_cast<Real>(0.6931471805599453);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
      const int64_t d = static_cast<int64_t>(e / N * kSharers + sharer) * N + e % N;
      if (writes && d < call.value_dim) {
        store_out(call, at * call.value_dim + d, out[r][e] * share);
      }
    }
  }
}

// A warp per query row, splits in order.
template <typename T, typename Real>
WINNOW_KERNEL(kThreads)
merge_splits(PagedCall<T, Real> call, int64_t pairs) {
  const int64_t rows = call.queries * call.group;
  const int64_t at = block_index() * kWarps + warp_index();
  if (at >= pairs * rows) return;
  const int64_t pair = at / rows;
  const int64_t row = at % rows;
  const int64_t batch = pair / call.key_heads;
  const int64_t entries = entries_of(call, length_of(call, batch));
  int64_t splits = ceil_div(entries, call.split_entries);
  if (call.block_indices || splits > call.splits) splits = call.splits;
  if (splits < 1) splits = 1;
  const Real none = -std::numeric_limits<Real>::infinity();
  const auto lses = call.partial_lse + at * call.splits;

  Real top = none;
  for (int64_t s = 0; s < splits; ++s) {
    const Real lse = lses[s];
    // A NaN must stay one.
    if (lse > top || lse != lse) top = lse;
  }
  Real sum = Real(0);
  for (int64_t s = 0; s < splits; ++s) {
    const Real lse = lses[s];
    if (lse != none) sum += exp2_of(lse - top);
  }
  const int64_t to = (batch * call.key_heads * call.group + pair % call.key_heads * call.group +
                      row % call.group) *
                         call.queries +
                     row / call.group;
  if (lane_index() == 0) {
    call.lse[to] =
        sum == Real(0) ? none : (top + log2(sum)) * static_cast<Real>(0.6931471805599453);
  }
  for (int64_t d = lane_index(); d < call.value_dim; d += kWarp) {
    Real out = Real(0);
    for (int64_t s = 0; s < splits; ++s) {
      const Real lse = lses[s];
      if (lse == none) continue;
      const Real part = call.partial_out[(at * call.splits + s) * call.value_dim + d];
      out = fma(exp2_of(lse - top), part, out);
    }
    store_out(call, to * call.value_dim + d, sum == Real(0) ? Real(0) : out / sum);
  }
}

}  // namespace
}  // namespace winnow
