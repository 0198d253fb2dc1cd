// The kernels of winnow::paged_attention. A warp takes up to kRows query rows of one key head
// (positions and the heads of a group packed together, so a key is read once for all of them) and a
// run of blocks: eight lanes share a key, four keys at a time, four such steps in flight. Softmax
// is online, in base 2; short queries split the keys over warps, and a second launch merges their
// partial results in a fixed order. Traffic: keys and values once per row tile, 1/64 of that for
// partial results.
#pragma once

#include <cmath>
#include <type_traits>

#include "kvcache/block_table.cuh"
#include "kvcache/codes.h"

namespace winnow {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSharers = 8;                     // lanes per key
constexpr int kKeysAbreast = kWarp / kSharers;  // keys that a warp works on at once

// Queries and results over pages of codes, whose dtype is looked up at run time. One of the
// pointers is set. `Memory` is float or const float.
template <typename Memory>
struct AnyFloating {
  template <typename T>
  using Like = std::conditional_t<std::is_const_v<Memory>, const T, T>;
  Global<Like<float>> as_float;
  Global<Like<c10::BFloat16>> as_bfloat16;
  Global<Like<c10::Half>> as_half;

  WINNOW_DEVICE float at(int64_t i) const {
    if (as_float) return as_float[i];
    if (as_bfloat16) return static_cast<float>(static_cast<c10::BFloat16>(as_bfloat16[i]));
    return static_cast<float>(static_cast<c10::Half>(as_half[i]));
  }
  WINNOW_DEVICE void put(int64_t i, float x) const {
    if (as_float) {
      as_float[i] = x;
    } else if (as_bfloat16) {
      as_bfloat16[i] = static_cast<c10::BFloat16>(x);
    } else {
      as_half[i] = static_cast<c10::Half>(x);
    }
  }
};

// A key's bias in any floating dtype; at most one of the pointers is set.
struct KeyBias {
  Global<const float> as_float;
  Global<const c10::BFloat16> as_bfloat16;
  Global<const c10::Half> as_half;
  Global<const double> as_double;
  int64_t stride[3];  // block, head, slot

  template <typename Real>
  WINNOW_DEVICE Real at(int64_t block, int64_t head, int64_t slot) const {
    const int64_t i = block * stride[0] + head * stride[1] + slot * stride[2];
    if (as_float) return static_cast<Real>(static_cast<float>(as_float[i]));
    if (as_bfloat16) return static_cast<Real>(static_cast<float>(as_bfloat16[i]));
    if (as_half) return static_cast<Real>(static_cast<float>(as_half[i]));
    if (as_double) return static_cast<Real>(static_cast<double>(as_double[i]));
    return Real(0);
  }
};

// T is the pages' element type. Strides in elements.
template <typename T, typename Real>
struct PagedCall {
  std::conditional_t<kCoded<T>, AnyFloating<const float>, Global<const T>> query;
  int64_t query_stride[3];  // batch, head, position
  Global<const T> key_pages;
  int64_t key_stride[3];  // block, head, slot
  Global<const T> value_pages;
  int64_t value_stride[3];
  Global<const float> key_scales;  // of codes
  int64_t key_scale_stride[2];     // block, head
  Global<const float> value_scales;
  int64_t value_scale_stride[2];
  Global<const int32_t> block_table;
  int64_t table_stride;
  int64_t table_width;
  Global<const int32_t> seq_lens;
  Global<const int32_t> block_indices;  // or null
  int64_t indices_stride[2];            // batch, key head
  int64_t entries;                      // of block_indices, or table_width
  KeyBias key_bias;
  int64_t num_blocks;
  int64_t block_size;
  int64_t batch;
  int64_t key_heads;
  int64_t group;
  int64_t queries;
  int64_t head_dim;
  int64_t value_dim;
  bool causal;
  int64_t window;  // 0: none
  int64_t sinks;
  Real scale;  // times log2(e)
  int64_t splits;
  int64_t split_entries;
  int64_t tasks;
  std::conditional_t<kCoded<T>, AnyFloating<float>, Global<T>> out;  // (B, Hq, T, Dv)
  Global<Real> lse;                                                  // (B, Hq, T)
  Global<Real> partial_out;  // (B * Hkv, rows, splits, Dv), where splits > 1
  Global<Real> partial_lse;  // (B * Hkv, rows, splits), base 2
};

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

template <typename T, typename Real>
WINNOW_DEVICE void store_out(const PagedCall<T, Real>& call, int64_t at, Real x) {
  if constexpr (kCoded<T>) {
    call.out.put(at, x);
  } else {
    call.out[at] = static_cast<T>(x);
  }
}

template <typename T, typename Real>
WINNOW_DEVICE int64_t length_of(const PagedCall<T, Real>& call, int64_t batch) {
  return length_of(call.seq_lens, batch, call.table_width * call.block_size);
}

// Entries of the block list that a row of the batch has.
template <typename T, typename Real>
WINNOW_DEVICE int64_t entries_of(const PagedCall<T, Real>& call, int64_t length) {
  return call.block_indices ? call.entries : ceil_div(length, call.block_size);
}

template <typename T, typename Real>
WINNOW_DEVICE bool sees(const PagedCall<T, Real>& call, int64_t i, int64_t j) {
  if (call.causal && j > i) return false;
  if (call.window == 0 || j < call.sinks) return true;
  const int64_t distance = i > j ? i - j : j - i;
  return distance < call.window;
}

// Whether some position in [first, last] may see some key in [begin, end).
template <typename T, typename Real>
WINNOW_DEVICE bool any_sees(const PagedCall<T, Real>& call, int64_t first, int64_t last,
                            int64_t begin, int64_t end) {
  if (call.causal && begin > last) return false;
  if (call.window == 0 || begin < call.sinks) return true;
  return end - 1 > first - call.window && begin < last + call.window;
}

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
    if (!any_sees(call, first_position, position[kRows - 1], begin, end)) continue;
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
          const bool seen = j < end && sees(call, position[r], j) && bias != none;
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
