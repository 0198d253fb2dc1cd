// Conditional Poisson sampling: k of n particles, a set with probability proportional to the
// product of its weights. Weights are scaled so that independent coins p = c w / (1 + c w) show
// about k heads; then P(m heads among the particles from i on) follows from i = n to 0 by
//
//   tail_i(m) = (1 - p_i) tail_{i+1}(m) + p_i tail_{i+1}(m - 1),
//
// sums of positive terms near their largest where it matters, so nothing cancels or overflows, and
// a logarithm is never needed. It is the recursion of elementary symmetric polynomials; scaling
// drops out of every ratio. Particle i is in a sample of which m are missing with probability
// p_i tail_{i+1}(m - 1) / tail_i(m). Every sqrt(n)-th row is kept and the others made twice: time
// 3 n k, memory 2 sqrt(n) k.
//
// Included by *_simd.cc only.
#pragma once

#include <cstdint>

#include "resampling/picks.h"
#include "resampling/sample_without_replacement_simd.h"
#include "resampling/tempered.h"

namespace winnow {
namespace {

struct Coins {
  int64_t n;
  int64_t k;       // 0 < k < n
  double* head;    // p
  double* tail;    // 1 - p
  double* memory;  // 2 sqrt(n) + 6 rows
};

// p of log weight x: exp on the side where it is small.
inline void toss(double x, double* head, double* tail) {
  const double small = exp_of(x < 0.0 ? x : -x);
  const double near = 1.0 / (1.0 + small);
  *head = x < 0.0 ? small * near : near;
  *tail = x < 0.0 ? near : small * near;
}

// Log weights `x` of n particles (consumed); `kth` is the k-th largest.
inline void make_coins(const Coins& coins, const double* x, double kth) {
  const auto expected = [&](double shift) {
    double sum = 0.0;
    for (int64_t i = 0; i < coins.n; i += kWide) {
      double part[kWide];
      for (int64_t l = 0; l < kWide; ++l) {
        const double y = i + l < coins.n ? x[i + l] - kth + shift : kNone;
        part[l] = y < 0.0 ? y : -y;
      }
      const f64x8 small = exp_wide(load_wide(part));
      std::memcpy(part, &small, sizeof small);
      for (int64_t l = 0; l < kWide && i + l < coins.n; ++l) {
        const bool rare = x[i + l] - kth + shift < 0.0;
        sum += (rare ? part[l] : 1.0) / (1.0 + part[l]);
      }
    }
    return sum;
  };
  // At `low` at most k heads are expected, at `high` at least k - 1/4; any shift in between is
  // right, and one that expects k leaves the largest numbers.
  const auto k = static_cast<double>(coins.k);
  double low = -log_of(static_cast<double>(coins.n - coins.k + 1));
  double high = log_of(4.0 * k);
  double shift = high;
  for (int step = 0; step < 40; ++step) {
    shift = 0.5 * (low + high);
    const double heads = expected(shift);
    if (heads > k - 0.25 && heads < k + 0.25) break;
    (heads < k ? low : high) = shift;
  }
  for (int64_t i = 0; i < coins.n; ++i) {
    toss(x[i] - kth + shift, coins.head + i, coins.tail + i);
  }
}

inline void clear_row(double* row, int64_t k) {
  for (int64_t j = -kRowMargin; j < count_row(k) - kRowMargin; ++j) row[j] = 0.0;
}

inline void store_wide(double* to, f64x8 v) {
  std::memcpy(to, &v, sizeof v);
}

// Whole vectors: what they say of more than k heads is right too, and nobody asks.
inline void tail_step(const Coins& coins, int64_t i, const double* after, double* row) {
  const f64x8 p = wide(coins.head[i]);
  const f64x8 q = wide(coins.tail[i]);
  for (int64_t m = 0; m <= coins.k; m += kWide) {
    store_wide(row + m, q * load_wide(after + m) + p * load_wide(after + m - 1));
  }
}

inline void head_step(const Coins& coins, int64_t i, double* heads) {
  const f64x8 p = wide(coins.head[i]);
  const f64x8 q = wide(coins.tail[i]);
  for (int64_t m = 0; m < coins.k; m += kWide) {
    store_wide(heads + m, q * load_wide(heads + m) + p * load_wide(heads + m + 1));
  }
}

inline double dot(const double* a, const double* b, int64_t n) {
  f64x8 sum = wide(0.0);
  int64_t j = 0;
  for (; j + kWide <= n; j += kWide) sum = sum + load_wide(a + j) * load_wide(b + j);
  double rest = 0.0;
  for (; j < n; ++j) rest += a[j] * b[j];
  return sum_wide(sum) + rest;
}

// visit(i, tail_i, tail_{i+1}, inclusion) for every particle in turn, until it returns false;
// inclusion() is the probability that particle i is in the sample.
template <typename Visit>
void walk(const Coins& coins, const Visit& visit) {
  const int64_t n = coins.n;
  const int64_t k = coins.k;
  const int64_t root = rows_between(n);
  const int64_t stride = count_row(k);
  const int64_t kept = (n + root - 1) / root;  // row b is tail_{b root}; the last one is tail_n
  const auto row = [&](int64_t r) { return coins.memory + r * stride + kRowMargin; };
  const int64_t spare = kept + 1;         // root + 1 rows of one block
  double* heads = row(spare + root + 1);  // P(k - 1 - m heads before i) at m
  for (int64_t r = 0; r <= spare + root + 1; ++r) clear_row(row(r), k);
  row(kept)[0] = 1.0;
  heads[k - 1] = 1.0;
  double* now = row(spare);
  double* next = row(spare + 1);
  const double* after = row(kept);
  for (int64_t i = n; i-- > 0;) {
    double* here = i % root == 0 ? row(i / root) : now;
    tail_step(coins, i, after, here);
    after = here;
    now = here == now ? next : now;
    next = row(spare) == now ? row(spare + 1) : row(spare);
  }
  const double all = row(0)[k];
  for (int64_t b = 0; b < kept; ++b) {
    const int64_t first = b * root;
    const int64_t end = first + root < n ? first + root : n;
    const auto in_block = [&](int64_t i) {
      return i == first ? row(b) : i == end ? row(b + 1) : row(spare + i - first);
    };
    for (int64_t i = end; i-- > first + 1;) tail_step(coins, i, in_block(i + 1), in_block(i));
    for (int64_t i = first; i < end; ++i) {
      const double* here = in_block(i);
      const double* behind = in_block(i + 1);
      const double p = coins.head[i];
      const auto inclusion = [&] {
        const double share = p * dot(heads, behind, k) / all;
        return share < 1.0 ? share : 1.0;
      };
      if (!visit(i, here, behind, inclusion)) return;
      head_step(coins, i, heads);
    }
  }
}

}  // namespace
}  // namespace winnow
