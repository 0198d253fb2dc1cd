// Attention over pages, with the online softmax of Milakov and Gimelshein (2018). A tile of up to
// 64 keys is read once for all rows of a task, that is for all query heads of its key head: scores
// of four rows at a time, their weights, and the weighted values. Sums stay in scratch memory. The
// rows of the next tile are prefetched while this one is computed, because pages lie scattered and
// the machine's own prefetcher stops at each end.
//
// Memory traffic: keys and values once, in 64-row tasks; scores never leave the L1 cache.
#include "kvcache/paged_attention_simd.h"

#include <limits>
#include <type_traits>

#include "common/dispatch_simd.h"
#include "common/lanes.h"
#include "kvcache/tile_lanes.h"

namespace winnow::CPU_CAPABILITY {
namespace {

constexpr int64_t kKeys = 64;  // keys of a tile
constexpr float kNone = -std::numeric_limits<float>::infinity();
// The weight of a key that its row may not see: adds nothing, and differs from a weight that
// underflowed. What an excluded key or value holds, even NaN, must not reach the result.
constexpr int32_t kHidden = std::numeric_limits<int32_t>::min();  // the bits of -0.0

int64_t round_up(int64_t n, int64_t step) {
  return (n + step - 1) / step * step;
}
int64_t smaller(int64_t a, int64_t b) {
  return a < b ? a : b;
}
int64_t larger(int64_t a, int64_t b) {
  return a > b ? a : b;
}

// The key positions that a query position sees: [low, high) and [0, sinks).
struct Span {
  int64_t low;
  int64_t high;
  int64_t sinks;

  bool misses(int64_t position, int64_t keys) const {
    return position >= sinks && (position >= high || position + keys <= low);
  }
  bool covers(int64_t position, int64_t keys) const {
    return (position >= low && position + keys <= high) || position + keys <= sinks;
  }
  bool has(int64_t position) const {
    return (position >= low && position < high) || position < sinks;
  }
};

Span span_of(const PagedAttention& call, int64_t length, int64_t row) {
  const int64_t i = length - call.queries + row / call.group;
  const int64_t causal_end = call.causal ? larger(0, i + 1) : length;
  Span span{0, causal_end, 0};
  if (call.window > 0) {
    span.low = larger(0, i - call.window + 1);
    if (!call.causal) span.high = larger(0, smaller(length, i + call.window));
    span.sinks = smaller(call.sinks, causal_end);
  }
  return span;
}

struct Tile {
  int64_t position;  // of the first key
  int64_t keys;
  int64_t block;
  int64_t slot;
};

// The tiles of a task in ascending order, without those that none of its rows sees.
struct Walk {
  const PagedAttention& call;
  const int32_t* table;
  const int32_t* list;
  int64_t length;
  Span span;
  int64_t entry;
  int64_t end;
  int64_t slot;

  Walk(const PagedAttention& c, const PagedAttentionTask& task)
      : call(c),
        table(c.block_table + task.batch * c.table_stride),
        list(c.block_indices ? c.block_indices + task.batch * c.indices_stride[0] +
                                   task.key_head * c.indices_stride[1]
                             : nullptr),
        length(c.seq_lens[task.batch]),
        span(span_of(c, length, task.first_row)),
        entry(task.begin),
        end(task.end),
        slot(0) {
    const Span last = span_of(c, length, task.first_row + task.rows - 1);
    span.high = last.high;
    span.sinks = last.sinks;
  }

  bool next(Tile* tile) {
    for (; entry < end; ++entry, slot = 0) {
      const int64_t logical = list ? list[entry] : entry;
      if (logical < 0) continue;
      const int64_t start = logical * call.block_size;
      const int64_t stop = smaller(call.block_size, length - start);
      while (slot < stop) {
        const int64_t keys = smaller(kKeys, stop - slot);
        *tile = {start + slot, keys, table[logical], slot};
        slot += keys;
        if (!span.misses(tile->position, keys)) return true;
      }
    }
    return false;
  }
};

template <typename T>
const T* key_row(const PagedAttention& call, const Tile& tile, int64_t head) {
  return static_cast<const T*>(call.key_pages) + tile.block * call.key_stride[0] +
         head * call.key_stride[1] + tile.slot * call.key_stride[2];
}

template <typename T>
const T* value_row(const PagedAttention& call, const Tile& tile, int64_t head) {
  return static_cast<const T*>(call.value_pages) + tile.block * call.value_stride[0] +
         head * call.value_stride[1] + tile.slot * call.value_stride[2];
}

// Into the L2 cache: tiles of keys and values, this one and the next, exceed the L1.
inline void prefetch(const void* from, int64_t bytes) {
  const char* p = static_cast<const char*>(from);
  for (int64_t offset = 0; offset < bytes; offset += 64) __builtin_prefetch(p + offset, 0, 2);
}

// Query rows as the dot products want them: floats, or bf16 pairs where the machine multiplies
// those.
#if defined(__AVX512BF16__)
template <typename T>
constexpr bool kPairs = std::is_same_v<T, c10::BFloat16>;
#else
template <typename T>
constexpr bool kPairs = false;
#endif
template <typename T>
using QueryElement = std::conditional_t<kPairs<T>, T, float>;

int64_t padded_dim(const PagedAttention& call) {
  return round_up(call.head_dim, 2 * kLanes);
}

template <typename T>
void load_queries(const PagedAttention& call, const PagedAttentionTask& task,
                  QueryElement<T>* queries) {
  const int64_t stride = padded_dim(call);
  for (int64_t r = 0; r < task.rows; ++r) {
    const int64_t row = task.first_row + r;
    const T* from = static_cast<const T*>(call.query) + task.batch * call.query_stride[0] +
                    (task.key_head * call.group + row % call.group) * call.query_stride[1] +
                    row / call.group * call.query_stride[2];
    QueryElement<T>* to = queries + r * stride;
    std::memset(static_cast<void*>(to), 0, static_cast<size_t>(stride) * sizeof *to);
    if constexpr (std::is_same_v<QueryElement<T>, T>) {
      std::memcpy(static_cast<void*>(to), from, static_cast<size_t>(call.head_dim) * sizeof *to);
    } else {
      int64_t d = 0;
      for (; d + kWide <= call.head_dim; d += kWide) store_part(to + d, load_part(from + d));
      if (d < call.head_dim) store_part(to + d, load_part(from + d, call.head_dim - d));
    }
  }
}

// One step of the dot products: kStep<T> elements of each row and key.
template <typename T>
constexpr int kStep = kPairs<T> ? 2 * kLanes : kWide;

template <int NR, typename T>
inline void dot_step(const QueryElement<T>* q, int64_t q_stride, const T* const* k, int64_t d,
                     int64_t left, FloatPart* sums) {
  constexpr int NK = kWide / NR;
#if defined(__AVX512BF16__)
  if constexpr (kPairs<T>) {
    const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1u;
    __m512i rows[NR];
#pragma GCC unroll 16
    for (int r = 0; r < NR; ++r) rows[r] = _mm512_loadu_si512(q + r * q_stride + d);
#pragma GCC unroll 16
    for (int n = 0; n < NK; ++n) {
      const __m512i key =
          left >= 32 ? _mm512_loadu_si512(k[n] + d) : _mm512_maskz_loadu_epi16(mask, k[n] + d);
#pragma GCC unroll 16
      for (int r = 0; r < NR; ++r) {
        sums[r * NK + n] =
            (FloatPart)_mm512_dpbf16_ps((__m512)sums[r * NK + n], (__m512bh)rows[r], (__m512bh)key);
      }
    }
    return;
  }
#endif
  if constexpr (!kPairs<T>) {
    FloatPart rows[NR];
#pragma GCC unroll 16
    for (int r = 0; r < NR; ++r) rows[r] = load_part(q + r * q_stride + d);
#pragma GCC unroll 16
    for (int n = 0; n < NK; ++n) {
      const FloatPart key = left >= kWide ? load_part(k[n] + d) : load_part(k[n] + d, left);
#pragma GCC unroll 16
      for (int r = 0; r < NR; ++r) sums[r * NK + n] = fma_part(rows[r], key, sums[r * NK + n]);
    }
  }
}

// scores[r][j] = q_r . k_j for NR rows, as many keys at a time as fill a register with sums.
template <int NR, typename T>
void dot_rows(const QueryElement<T>* q, int64_t q_stride, const T* keys, int64_t key_stride,
              int64_t count, int64_t dim, float* scores, const T* next) {
  constexpr int NK = kWide / NR;
  for (int64_t j = 0; j < count; j += NK) {
    const T* k[NK];
    for (int n = 0; n < NK; ++n) {
      const int64_t row = smaller(j + n, count - 1);
      k[n] = keys + row * key_stride;
      if (next) prefetch(next + row * key_stride, dim * static_cast<int64_t>(sizeof(T)));
    }
    FloatPart sums[kWide];
#pragma GCC unroll 16
    for (int i = 0; i < kWide; ++i) sums[i] = FloatPart{};
    int64_t d = 0;
    for (; d + kStep<T> <= dim; d += kStep<T>) dot_step<NR>(q, q_stride, k, d, kStep<T>, sums);
    if (d < dim) dot_step<NR>(q, q_stride, k, d, dim - d, sums);
    float products[kWide];
    store_part(products, sum_each(sums));
    for (int r = 0; r < NR; ++r) {
      std::memcpy(scores + r * kKeys + j, products + r * NK, NK * sizeof(float));
    }
  }
}

struct RowState {
  float* top;     // largest score so far
  float* total;   // sum of exp(score - top)
  float* shrink;  // by what this tile's larger top scales the earlier sums
};

// Turns the scores of one row into weights exp(score - top), kHidden where the row may not look.
void weigh(float* scores, const Tile& tile, const Span& span, float scale, const float* bias,
           float* top, float* total, float* shrink) {
  const bool whole = span.covers(tile.position, tile.keys);
  const auto local = [&](int64_t bound) {
    return static_cast<int32_t>(larger(-1, smaller(bound - tile.position, kKeys)));
  };
  const i32x16 low = local(span.low);
  const i32x16 high = local(span.high);
  const i32x16 sinks = local(span.sinks);
  f32x16 running = *top;
  for (int64_t j = 0; j < tile.keys; j += kLanes) {
    f32x16 x = load_lanes(scores + j) * scale;
    if (bias) {
      const f32x16 extra = load_lanes(bias + j);
      x = select(extra == f32x16(kNone), f32x16(kNone), x + extra);  // hides even a NaN
    }
    if (!whole || j + kLanes > tile.keys) {
      const i32x16 index = lane_index() + static_cast<int32_t>(j);
      const i32x16 seen = ((index > low - 1) & (index < high)) | (index < sinks);
      x = select(seen & (index < static_cast<int32_t>(tile.keys)), x, f32x16(kNone));
    }
    store_lanes(scores + j, x);
    running = max_lanes(x, running);
  }
  const float highest = halving_max(running);
  const float shift = highest == kNone ? 0.0f : highest;  // -inf - -inf would be NaN
  f32x16 sum = 0.0f;
  for (int64_t j = 0; j < tile.keys; j += kLanes) {
    const f32x16 x = load_lanes(scores + j);
    const f32x16 weight = select(x == f32x16(kNone), as_float(i32x16(kHidden)), exp_lanes(x - shift));
    store_lanes(scores + j, weight);
    sum = sum + weight;
  }
  float factor[kLanes];
  store_lanes(factor, exp_lanes(f32x16(*top - shift)));
  *shrink = *top == highest ? 1.0f : factor[0];
  *total = *total * *shrink + halving_sum(sum);
  *top = highest;
}

// The sums of a strip once more, key by key, leaving out what is hidden: a NaN or an infinity there
// has spoilt them.
template <typename Load>
FloatPart careful_sum(const float* weights, int64_t count, const Load& load) {
  FloatPart sum{};
  for (int64_t j = 0; j < count; ++j) {
    int32_t bits;
    std::memcpy(&bits, weights + j, sizeof bits);
    if (bits != kHidden) sum = fma_part(FloatPart{} + weights[j], load(j), sum);
  }
  return sum;
}

// sums[r][c] = sums[r][c] * shrink[r] + sum_j weights[r][j] * values[j][c] for NR rows and NC
// registers of columns; `columns` < kWide (with NC = 1) for the last, incomplete one.
template <int NR, int NC, typename T>
void add_strip(const float* weights, const T* values, int64_t stride, int64_t count,
               int64_t columns, float* sums, int64_t sums_stride, const float* shrink,
               const T* next) {
  const auto load = [&](int64_t j, int c) {
    const T* row = values + j * stride;
    return NC > 1 || columns >= kWide ? load_part(row + c * kWide) : load_part(row, columns);
  };
  FloatPart strip[NR][NC];
#pragma GCC unroll 16
  for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < NC; ++c) strip[r][c] = FloatPart{};
  }
  for (int64_t j = 0; j < count; ++j) {
    if (next) prefetch(next + j * stride, NC * kWide * static_cast<int64_t>(sizeof(T)));
    FloatPart v[NC];
#pragma GCC unroll 16
    for (int c = 0; c < NC; ++c) v[c] = load(j, c);
#pragma GCC unroll 16
    for (int r = 0; r < NR; ++r) {
      const FloatPart weight = FloatPart{} + weights[r * kKeys + j];
#pragma GCC unroll 16
      for (int c = 0; c < NC; ++c) strip[r][c] = fma_part(weight, v[c], strip[r][c]);
    }
  }
  FloatPart all{};
#pragma GCC unroll 16
  for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < NC; ++c) all += strip[r][c];
  }
  const bool spoilt = any_nan(all);
#pragma GCC unroll 16
  for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < NC; ++c) {
      if (__builtin_expect(spoilt, 0)) {
        strip[r][c] =
            careful_sum(weights + r * kKeys, count, [&](int64_t j) { return load(j, c); });
      }
      float* sum = sums + r * sums_stride + c * kWide;
      store_part(sum, fma_part(load_part(sum), FloatPart{} + shrink[r], strip[r][c]));
    }
  }
}

// Registers of columns that a strip of NR rows keeps: all accumulators, values and a weight fit.
template <int NR>
constexpr int kStripColumns = (kParts == 1 ? 16 : 8) / NR;

template <int NR, typename T>
void add_values(const float* weights, const T* values, int64_t stride, int64_t count, int64_t dim,
                float* sums, int64_t sums_stride, const float* shrink, const T* next) {
  constexpr int NC = kStripColumns<NR> > 8 ? 8 : kStripColumns<NR>;
  int64_t c = 0;
  for (; c + NC * kWide <= dim; c += NC * kWide) {
    add_strip<NR, NC>(weights, values + c, stride, count, 0, sums + c, sums_stride, shrink,
                      next ? next + c : nullptr);
  }
  for (; c < dim; c += kWide) {
    add_strip<NR, 1>(weights, values + c, stride, count, dim - c, sums + c, sums_stride, shrink,
                     next ? next + c : nullptr);
  }
}

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

template <typename T>
struct Scratch {
  QueryElement<T>* queries;
  float* scores;
  float* sums;
  float* bias;
  RowState state;
  int64_t sums_stride;

  Scratch(const PagedAttention& call, int64_t rows, void* memory) {
    float* p = static_cast<float*>(memory);
    const auto take = [&](int64_t floats) {
      float* taken = p;
      p += round_up(floats, kLanes);
      return taken;
    };
    sums_stride = round_up(call.value_dim, kLanes);
    queries = reinterpret_cast<QueryElement<T>*>(take(rows * padded_dim(call)));
    scores = take(4 * kKeys);
    sums = take(rows * sums_stride);
    bias = take(kKeys);
    state = {take(rows), take(rows), take(rows)};
  }
};

template <int NR, typename T>
void attend_rows(const PagedAttention& call, const PagedAttentionTask& task, const Tile& tile,
                 const Tile* next, int64_t first, const Scratch<T>& scratch) {
  const int64_t head = task.key_head;
  float* scores = scratch.scores;
  const RowState& state = scratch.state;
  dot_rows<NR, T>(scratch.queries + first * padded_dim(call), padded_dim(call),
                  key_row<T>(call, tile, head), call.key_stride[2], tile.keys, call.head_dim,
                  scores, next ? key_row<T>(call, *next, head) : nullptr);
  const int64_t length = call.seq_lens[task.batch];
  for (int r = 0; r < NR; ++r) {
    const int64_t row = first + r;
    weigh(scores + r * kKeys, tile, span_of(call, length, task.first_row + row),
          static_cast<float>(call.scale), call.key_bias ? scratch.bias : nullptr, state.top + row,
          state.total + row, state.shrink + row);
  }
  add_values<NR, T>(scores, value_row<T>(call, tile, head), call.value_stride[2], tile.keys,
                    call.value_dim, scratch.sums + first * scratch.sums_stride, scratch.sums_stride,
                    state.shrink + first, next ? value_row<T>(call, *next, head) : nullptr);
}

// Divides by the normaliser and stores a row of the result and its lse.
template <typename T>
void finish_row(const PagedAttention& call, const PagedAttentionTask& task, int64_t row,
                float* sums, float top, float total) {
  const float factor = total == 0.0f ? 0.0f : 1.0f / total;
  for (int64_t d = 0; d < call.value_dim; ++d) sums[d] *= factor;
  const int64_t heads = call.key_heads * call.group;
  const int64_t head = task.key_head * call.group + row % call.group;
  const int64_t index = (task.batch * heads + head) * call.queries + row / call.group;
  store_row(static_cast<T*>(call.out) + index * call.value_dim, sums, call.value_dim);
  static_cast<float*>(call.lse)[index] = total == 0.0f ? kNone : top + __builtin_logf(total);
}

template <typename T>
void run_task(const PagedAttention& call, const PagedAttentionTask& task, void* memory,
              float* partial) {
  const Scratch<T> scratch(call, task.rows, memory);
  const RowState& state = scratch.state;
  load_queries<T>(call, task, scratch.queries);
  std::memset(scratch.sums, 0,
              static_cast<size_t>(task.rows * scratch.sums_stride) * sizeof(float));
  for (int64_t r = 0; r < task.rows; ++r) {
    state.top[r] = kNone;
    state.total[r] = 0.0f;
  }
  const int64_t length = call.seq_lens[task.batch];
  Walk walk(call, task);
  Tile tile;
  Tile next;
  bool more = walk.next(&tile);
  while (more) {
    more = walk.next(&next);
    if (call.key_bias) load_bias(call, tile, task.key_head, scratch.bias);
    const Tile* ahead = more && next.keys >= tile.keys ? &next : nullptr;
    for (int64_t r = 0; r < task.rows;) {
      const int64_t step = task.rows - r >= 4 ? 4 : task.rows - r >= 2 ? 2 : 1;
      // Rows ascend in position, so their spans do: the last one's end and the first one's start.
      Span span = span_of(call, length, task.first_row + r);
      const Span last = span_of(call, length, task.first_row + r + step - 1);
      span.high = last.high;
      span.sinks = last.sinks;
      if (!span.misses(tile.position, tile.keys)) {
        if (step == 4) {
          attend_rows<4, T>(call, task, tile, ahead, r, scratch);
        } else if (step == 2) {
          attend_rows<2, T>(call, task, tile, ahead, r, scratch);
        } else {
          attend_rows<1, T>(call, task, tile, ahead, r, scratch);
        }
        ahead = nullptr;  // once is enough
      }
      r += step;
    }
    tile = next;
  }
  for (int64_t r = 0; r < task.rows; ++r) {
    float* sums = scratch.sums + r * scratch.sums_stride;
    if (task.partial < 0) {
      finish_row<T>(call, task, task.first_row + r, sums, state.top[r], state.total[r]);
    } else {
      float* to = partial + (task.partial + r) * (call.value_dim + 2);
      std::memcpy(to, sums, static_cast<size_t>(call.value_dim) * sizeof(float));
      to[call.value_dim] = state.top[r];
      to[call.value_dim + 1] = state.total[r];
    }
  }
}

template <typename T>
void merge_task(const PagedAttention& call, const PagedAttentionTask& task, int64_t splits,
                int64_t stride, float* sums, const float* partial) {
  const int64_t dim = call.value_dim;
  for (int64_t r = 0; r < task.rows; ++r) {
    const float* rows = partial + (task.partial + r) * (dim + 2);
    float top = kNone;
    for (int64_t s = 0; s < splits; ++s) {
      const float other = rows[s * stride * (dim + 2) + dim];
      top = other > top ? other : top;
    }
    const float shift = top == kNone ? 0.0f : top;
    float total = 0.0f;
    for (int64_t d = 0; d < dim; ++d) sums[d] = 0.0f;
    for (int64_t s = 0; s < splits; ++s) {
      const float* row = rows + s * stride * (dim + 2);
      float factors[kLanes];
      store_lanes(factors, exp_lanes(f32x16(row[dim] - shift)));
      const float factor = row[dim] == top ? 1.0f : factors[0];
      for (int64_t d = 0; d < dim; ++d) sums[d] += row[d] * factor;
      total += row[dim + 1] * factor;
    }
    finish_row<T>(call, task, task.first_row + r, sums, top, total);
  }
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
          extra =
              wide_bias[tile.block * call.bias_stride[0] + task.key_head * call.bias_stride[1] +
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

void paged_attention_scratch(const PagedAttention& call, int64_t rows, int64_t* floats) {
  *floats = rows * (padded_dim(call) + round_up(call.value_dim, kLanes)) + 5 * kKeys +
            3 * round_up(rows, kLanes) + 8 * kLanes;
}

void paged_attention_task(const PagedAttention& call, const PagedAttentionTask& task, void* scratch,
                          void* partial) {
  dispatch_element(call.type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (std::is_same_v<T, double>) {
      run_double(call, task, static_cast<double*>(scratch));
    } else {
      run_task<T>(call, task, scratch, static_cast<float*>(partial));
    }
  });
}

void paged_attention_merge(const PagedAttention& call, const PagedAttentionTask& task,
                           int64_t splits, int64_t stride, void* scratch, const void* partial) {
  dispatch_element(call.type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, double>) {
      merge_task<T>(call, task, splits, stride, static_cast<float*>(scratch),
                    static_cast<const float*>(partial));
    }
  });
}

}  // namespace winnow::CPU_CAPABILITY
