// Summaries of the keys of a block and the scores of blocks against queries. No fused multiply-adds
// and sums in one order: which blocks are selected must not depend on the instruction set.
#include "kvcache/block_scores_simd.h"

#include <limits>
#include <type_traits>

#include "common/dispatch_simd.h"
#include "common/lanes.h"
#include "kvcache/code_numbers.h"

namespace winnow::CPU_CAPABILITY {
namespace {

constexpr int kAbreast = 4;  // queries that are scored together

// As torch.minimum and torch.maximum: NaN where either is.
inline f32x16 lower(f32x16 a, f32x16 b) {
  i32x16 take = a < b;
  take = take | (a != a);
  return select(take, a, b);
}

inline f32x16 higher(f32x16 a, f32x16 b) {
  i32x16 take = a > b;
  take = take | (a != a);
  return select(take, a, b);
}

inline double lower(double a, double b) {
  return a < b || a != a ? a : b;
}
inline double higher(double a, double b) {
  return a > b || a != a ? a : b;
}

template <typename T>
f32x16 load(const T* p, int64_t n) {
  return n >= kLanes ? load_lanes(p) : load_lanes(p, n, 0.0f);
}

void store(float* p, f32x16 v, int64_t n) {
  std::memcpy(p, &v, static_cast<size_t>(n < kLanes ? n : kLanes) * sizeof(float));
}

// NC registers of columns at a time: a row of a block is read in few pieces, in order.
template <int NC, typename T>
void summary_strip(const T* keys, int64_t stride, int64_t count, int64_t left, bool minmax,
                   float* low_or_mean, float* high) {
  f32x16 a[NC];
  f32x16 b[NC];
  for (int c = 0; c < NC; ++c) a[c] = b[c] = load(keys + c * kLanes, left - c * kLanes);
  if (minmax) {
    for (int64_t j = 1; j < count; ++j) {
#pragma GCC unroll 4
      for (int c = 0; c < NC; ++c) {
        const f32x16 x = load(keys + j * stride + c * kLanes, left - c * kLanes);
        a[c] = lower(a[c], x);
        b[c] = higher(b[c], x);
      }
    }
  } else {
    for (int64_t j = 1; j < count; ++j) {
#pragma GCC unroll 4
      for (int c = 0; c < NC; ++c) {
        a[c] = a[c] + load(keys + j * stride + c * kLanes, left - c * kLanes);
      }
    }
    for (int c = 0; c < NC; ++c) a[c] = a[c] / f32x16(static_cast<float>(count));
  }
  for (int c = 0; c < NC; ++c) {
    store(low_or_mean + c * kLanes, a[c], left - c * kLanes);
    if (minmax) store(high + c * kLanes, b[c], left - c * kLanes);
  }
}

template <typename T>
void summary_of(const T* keys, int64_t stride, int64_t count, int64_t dim, bool minmax,
                float* summary) {
  float* high = summary + dim;
  int64_t d = 0;
  for (; d + 4 * kLanes <= dim; d += 4 * kLanes) {
    summary_strip<4>(keys + d, stride, count, 4 * kLanes, minmax, summary + d, high + d);
  }
  for (; d < dim; d += kLanes) {
    summary_strip<1>(keys + d, stride, count, dim - d, minmax, summary + d, high + d);
  }
}

void summary_of(const double* keys, int64_t stride, int64_t count, int64_t dim, bool minmax,
                double* summary) {
  for (int64_t d = 0; d < dim; ++d) {
    double low = keys[d];
    double high = low;
    double sum = low;
    for (int64_t j = 1; j < count; ++j) {
      const double x = keys[j * stride + d];
      low = lower(low, x);
      high = higher(high, x);
      sum += x;
    }
    summary[d] = minmax ? low : sum / static_cast<double>(count);
    if (minmax) summary[dim + d] = high;
  }
}

// sum_d max(q_d low_d, q_d high_d) bounds q.k for every key between the two; without a high it is
// the dot product with the mean.
// NR queries at a time share the loads, and their sums do not wait for one another.
template <int NR, typename T>
void scores_of(const T* const* query, const float* low, const float* high, int64_t dim,
               float* scores) {
  f32x16 sum[NR];
  for (int r = 0; r < NR; ++r) sum[r] = 0.0f;
  for (int64_t d = 0; d < dim; d += kLanes) {
    const f32x16 a = load(low + d, dim - d);
    const f32x16 b = high ? load(high + d, dim - d) : a;
#pragma GCC unroll 4
    for (int r = 0; r < NR; ++r) {
      const f32x16 q = load(query[r] + d, dim - d);
      const f32x16 x = q * a;
      sum[r] = sum[r] + (high ? higher(x, q * b) : x);
    }
  }
  for (int r = 0; r < NR; ++r) scores[r] = sum_lanes(sum[r]);
}

template <int NR>
void scores_of(const double* const* query, const double* low, const double* high, int64_t dim,
               double* scores) {
  for (int r = 0; r < NR; ++r) {
    double sum = 0.0;
    for (int64_t d = 0; d < dim; ++d) {
      const double x = query[r][d] * low[d];
      sum += high ? higher(x, query[r][d] * high[d]) : x;
    }
    scores[r] = sum;
  }
}

}  // namespace

void block_summary(const void* keys, ElementType type, int64_t stride, int64_t count, int64_t dim,
                   bool minmax, void* summary) {
  dispatch_element(type, [&](auto zero) {
    using T = decltype(zero);
    using Result = std::conditional_t<std::is_same_v<T, double>, double, float>;
    auto* out = static_cast<Result*>(summary);
    if (count == 0) {
      std::memset(out, 0, static_cast<size_t>(minmax ? 2 * dim : dim) * sizeof(Result));
    } else {
      summary_of(static_cast<const T*>(keys), stride, count, dim, minmax, out);
    }
  });
}

void code_block_summary(const void* codes, CodeType type, float scale, int64_t stride,
                        int64_t count, int64_t dim, bool minmax, float* summary) {
  const int64_t numbers = minmax ? 2 * dim : dim;
  if (count == 0) {
    std::memset(summary, 0, static_cast<size_t>(numbers) * sizeof(float));
    return;
  }
  dispatch_codes(type, [&](auto zero) {
    summary_of(static_cast<const decltype(zero)*>(codes), stride, count, dim, minmax, summary);
  });
  for (int64_t d = 0; d < numbers; ++d) summary[d] *= scale;
}

void block_scores(const void* query, ElementType type, int64_t head_stride, int64_t position_stride,
                  int64_t group, int64_t queries, int64_t dim, const void* summaries,
                  int64_t block_stride, int64_t bounds_stride, int64_t blocks, void* scores) {
  dispatch_element(type, [&](auto zero) {
    using T = decltype(zero);
    using Result = std::conditional_t<std::is_same_v<T, double>, double, float>;
    for (int64_t i = 0; i < blocks; ++i) {
      const Result* low = static_cast<const Result*>(summaries) + i * block_stride;
      const Result* high = bounds_stride > 0 ? low + bounds_stride : nullptr;
      Result best = -std::numeric_limits<Result>::infinity();
      const int64_t rows = group * queries;
      for (int64_t n = 0; n < rows;) {
        const int64_t count = rows - n >= kAbreast ? kAbreast : 1;
        const T* q[kAbreast];
        for (int64_t r = 0; r < count; ++r) {
          q[r] = static_cast<const T*>(query) + (n + r) / queries * head_stride +
                 (n + r) % queries * position_stride;
        }
        Result score[kAbreast];
        if (count == kAbreast) {
          scores_of<kAbreast>(q, low, high, dim, score);
        } else {
          scores_of<1>(q, low, high, dim, score);
        }
        for (int64_t r = 0; r < count; ++r) {
          if (score[r] > best || score[r] != score[r]) best = score[r];
        }
        n += count;
      }
      static_cast<Result*>(scores)[i] = best;
    }
  });
}

}  // namespace winnow::CPU_CAPABILITY
