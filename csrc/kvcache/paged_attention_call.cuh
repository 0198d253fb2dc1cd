// A call of winnow::paged_attention as its kernels see it.
#pragma once

#include <type_traits>

#include "kvcache/block_table.cuh"
#include "kvcache/codes.h"

namespace winnow {
namespace {

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
  Mask mask;
  Real scale;  // times log2(e)
  int64_t splits;
  int64_t split_entries;
  int64_t tasks;
  std::conditional_t<kCoded<T>, AnyFloating<float>, Global<T>> out;  // (B, Hq, T, Dv)
  Global<Real> lse;                                                  // (B, Hq, T)
  Global<Real> partial_out;  // (B * Hkv, rows, splits, Dv), where splits > 1
  Global<Real> partial_lse;  // (B * Hkv, rows, splits), base 2
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

}  // namespace
}  // namespace winnow
