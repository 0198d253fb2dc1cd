// How the kernels of this family see rows of logits. One kernel serves every dtype: the dtype of
// what is read is known when it runs, which costs a branch per load and saves two thirds of the
// compilation.
#pragma once

#include "common/device.h"
#include "unmasking/logit_rows.h"
#include "unmasking/masked_tokens.cuh"

namespace winnow {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 32;
constexpr int kSlice = kThreads * kPerThread;
constexpr int kSliceBlocks = kThreads / kWarp;  // blocks of the grid in a slice
static_assert(kSlice == kSliceBlocks * kLogitBlock, "a block for each warp");

// Neighbouring logits that a thread reads at once: the same for every dtype, so that sums are added
// in one order.
template <typename Real>
constexpr int kGroup = 16 / sizeof(Real);

// Numbers that are computed with as Real; at most one of the pointers is set.
template <typename Real>
struct LogitSource;

template <>
struct LogitSource<float> {
  Global<const float> single = {};
  Global<const c10::BFloat16> brain = {};
  Global<const c10::Half> half = {};

  WINNOW_DEVICE Global<const float> of(float) const { return single; }
  WINNOW_DEVICE Global<const c10::BFloat16> of(c10::BFloat16) const { return brain; }
  WINNOW_DEVICE Global<const c10::Half> of(c10::Half) const { return half; }
  WINNOW_DEVICE explicit operator bool() const { return single || brain || half; }

  // fn(zero of the dtype)
  template <typename Fn>
  WINNOW_DEVICE void with_dtype(const Fn& fn) const {
    if (single) {
      fn(float{});
    } else if (brain) {
      fn(c10::BFloat16{});
    } else {
      fn(c10::Half{});
    }
  }
  WINNOW_DEVICE float operator[](int64_t i) const {
    if (single) {
      const float x = single[i];
      return x;
    }
    if (brain) {
      const c10::BFloat16 x = brain[i];
      return static_cast<float>(x);
    }
    const c10::Half x = half[i];
    return static_cast<float>(x);
  }
};

template <>
struct LogitSource<double> {
  Global<const double> wide;

  WINNOW_DEVICE Global<const double> of(double) const { return wide; }
  WINNOW_DEVICE explicit operator bool() const { return static_cast<bool>(wide); }
  template <typename Fn>
  WINNOW_DEVICE void with_dtype(const Fn& fn) const {
    fn(double{});
  }
  WINNOW_DEVICE double operator[](int64_t i) const {
    const double x = wide[i];
    return x;
  }
};

// Logits and what is applied while they are loaded. Strides in elements.
template <typename Real>
struct LogitView {
  LogitSource<Real> logits;
  int64_t stride;
  bool vectors;                     // rows may be read a group at a time, unconditional ones too
  LogitSource<Real> unconditional;  // or nothing
  int64_t unconditional_stride;
  Real guidance;  // cfg_scale + 1
  Global<const int64_t> suppressed;
  int64_t given_count;       // of suppressed
  int64_t suppressed_count;  // one more where a mask token is suppressed too
  int64_t vocab;
  int64_t start;               // id of the first logit in the whole vocabulary
  int64_t shifted;             // length of sequences whose logits come one early; 0: none
  Global<const bool> mask;     // or null
  Global<const int64_t> keys;  // of the draws, or null
  MaskedTokens tokens;

  WINNOW_DEVICE int64_t source(int64_t row) const {
    return shifted > 0 && row % shifted > 0 ? row - 1 : row;
  }
  WINNOW_DEVICE int64_t key(int64_t row) const {
    if (!keys) return row;
    const int64_t own = keys[row];
    return own;
  }
  // Index within the row, or outside of it.
  WINNOW_DEVICE int64_t suppressed_at(int64_t s) const {
    if (s >= given_count) return tokens.mask_id - start;
    const int64_t id = suppressed[s];
    return id - start;
  }
  // Slices lie on the grid: the row's first logit is at this place of the first one.
  WINNOW_DEVICE int64_t offset() const { return start % kLogitBlock; }
  WINNOW_DEVICE int64_t blocks() const {
    return vocab == 0 ? 0 : ceil_div<int64_t>(offset() + vocab, kLogitBlock);
  }
};

template <typename Real>
WINNOW_DEVICE bool skips(const LogitView<Real>& view, int64_t row) {
  if (view.mask) {
    const bool counts = view.mask[row];
    if (!counts) return true;
  }
  return view.tokens.length > 0 && !view.tokens.contains(row);
}

// Equal logits stay as they are: infinite ones would become NaN.
template <typename Real>
WINNOW_DEVICE Real guided(Real x, Real u, Real guidance) {
  return x == u ? x : u + guidance * (x - u);
}

// One logit without suppression.
template <typename Real>
WINNOW_DEVICE Real plain_logit(const LogitView<Real>& view, int64_t row, int64_t i) {
  const int64_t source = view.source(row);
  const Real x = view.logits[source * view.stride + i];
  if (!view.unconditional) return x;
  const Real u = view.unconditional[source * view.unconditional_stride + i];
  return guided(x, u, view.guidance);
}

template <typename Real>
WINNOW_DEVICE Real logit_at(const LogitView<Real>& view, int64_t row, int64_t i) {
  for (int64_t s = 0; s < view.suppressed_count; ++s) {
    if (view.suppressed_at(s) == i) return -std::numeric_limits<Real>::infinity();
  }
  return plain_logit(view, row, i);
}

// A bit for every suppressed id of a slice, kSlice / 32 words. Ids outside of the vocabulary have
// none.
template <typename Real>
WINNOW_DEVICE void mark_suppressed(const LogitView<Real>& view, int64_t slice,
                                   Shared<uint32_t> bits) {
  if (view.suppressed_count == 0) return;
  block_sync();  // the last slice's have been read
  bits[thread_index()] = 0u;
  static_assert(kSlice == kThreads * 32, "a word for each thread");
  block_sync();
  for (int64_t s = thread_index(); s < view.suppressed_count; s += kThreads) {
    const int64_t at = view.suppressed_at(s) + view.offset() - slice * kSlice;
    if (at >= 0 && at < kSlice) atomic_or(bits + at / 32, 1u << at % 32);
  }
  block_sync();
}

template <typename Real>
WINNOW_DEVICE bool is_suppressed(const LogitView<Real>& view, Shared<uint32_t> bits,
                                 int64_t within) {
  if (view.suppressed_count == 0) return false;
  const uint32_t word = bits[within / 32];
  return (word >> within % 32 & 1u) != 0;
}

// Element e of a thread's share of a slice: of its warp's block, groups of neighbours, a warp
// apart.
template <typename Real>
WINNOW_DEVICE int64_t within_slice(int e) {
  constexpr int N = kGroup<Real>;
  return warp_index() * kLogitBlock + static_cast<int64_t>(e / N * kWarp + lane_index()) * N +
         e % N;
}

// The group that begins at index `at` of a row; -infinity beyond the row.
template <typename Real, typename T>
WINNOW_DEVICE Vector<Real, kGroup<Real>> load_group(Global<const T> row, int64_t at, int64_t vocab,
                                                    bool vectors) {
  constexpr int N = kGroup<Real>;
  Vector<Real, N> group;
  if (vectors && at >= 0 && at + N <= vocab) {
    const Vector<T, N> loaded = load_vector<N>(row + at);
#pragma unroll
    for (int e = 0; e < N; ++e) group.element[e] = static_cast<Real>(loaded.element[e]);
    return group;
  }
#pragma unroll
  for (int e = 0; e < N; ++e) {
    group.element[e] = -std::numeric_limits<Real>::infinity();
    if (at + e < 0 || at + e >= vocab) continue;
    const T x = row[at + e];
    group.element[e] = static_cast<Real>(x);
  }
  return group;
}

// The thread's share of a slice, -infinity beyond the row; guided by the unconditional logits where
// kGuided allows for them.
template <bool kGuided, typename Real>
WINNOW_DEVICE void read_slice(const LogitView<Real>& view, int64_t row, int64_t slice, Real* x) {
  constexpr int N = kGroup<Real>;
  const int64_t first = slice * kSlice - view.offset();  // index of the slice's first place
  const int64_t source = view.source(row);
  view.logits.with_dtype([&](auto zero) {
    const auto logits = view.logits.of(zero) + source * view.stride;
    const auto base = view.unconditional.of(zero) + source * view.unconditional_stride;
#pragma unroll
    for (int v = 0; v < kPerThread / N; ++v) {
      const int64_t at = first + within_slice<Real>(v * N);
      const auto group = load_group<Real>(logits, at, view.vocab, view.vectors);
#pragma unroll
      for (int e = 0; e < N; ++e) x[v * N + e] = group.element[e];
      if (!kGuided || !view.unconditional) continue;
      const auto other = load_group<Real>(base, at, view.vocab, view.vectors);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        x[v * N + e] = guided(x[v * N + e], other.element[e], view.guidance);
      }
    }
  });
}

// Of logits that nothing is applied to.
template <typename Real>
WINNOW_DEVICE void load_plain_slice(const LogitView<Real>& view, int64_t row, int64_t slice,
                                    Real* x) {
  read_slice<false>(view, row, slice, x);
}

// -infinity where it is suppressed, too.
template <typename Real>
WINNOW_DEVICE void load_slice(const LogitView<Real>& view, int64_t row, int64_t slice,
                              Shared<uint32_t> bits, Real* x) {
  read_slice<true>(view, row, slice, x);
  if (view.suppressed_count == 0) return;
#pragma unroll
  for (int e = 0; e < kPerThread; ++e) {
    if (is_suppressed(view, bits, within_slice<Real>(e))) {
      x[e] = -std::numeric_limits<Real>::infinity();
    }
  }
}

// ---- launchers ----

// fn receives a zero of the type that statistics of the logits have.
template <typename Fn>
void dispatch_real(const Tensor& logits, const Fn& fn) {
  if (statistics_dtype(logits) == ScalarType::Double) {
    fn(double{});
  } else {
    fn(float{});
  }
}

template <typename Real>
LogitSource<Real> source_of(const Tensor& tensor) {
  LogitSource<Real> source = {};
  if constexpr (std::is_same_v<Real, double>) {
    source.wide = global<const double>(tensor);
  } else if (tensor.scalar_type() == ScalarType::Float) {
    source.single = global<const float>(tensor);
  } else if (tensor.scalar_type() == ScalarType::BFloat16) {
    source.brain = global<const c10::BFloat16>(tensor);
  } else {
    source.half = global<const c10::Half>(tensor);
  }
  return source;
}

template <typename Real>
bool in_groups(const Rows& rows) {
  const auto bytes = static_cast<uintptr_t>(kGroup<Real> * rows.tensor.element_size());
  return reinterpret_cast<uintptr_t>(rows.tensor.data_ptr()) % bytes == 0 &&
         (rows.count <= 1 || rows.stride % kGroup<Real> == 0);
}

template <typename Real>
LogitView<Real> view_of(const Rows& rows) {
  LogitView<Real> view = {};
  view.logits = source_of<Real>(rows.tensor);
  view.stride = rows.stride;
  view.vectors = in_groups<Real>(rows);
  view.vocab = rows.length;
  return view;
}

}  // namespace
}  // namespace winnow
