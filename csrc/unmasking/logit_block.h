// Loads a block of a row with guidance and suppression applied, and the exponential that every
// unmasking loop shares. Included by *_simd.cc only.
#pragma once

#include "common/lanes.h"
#include "unmasking/logit_rows.h"

namespace winnow {
namespace {

constexpr float kNoLogit = -std::numeric_limits<float>::infinity();

// log2(e) / temperature * 2^23, what exp_scaled multiplies with. Finite and not 0, so that 0 stays
// 0 and infinity infinite.
inline float exponent_scale(double temperature) {
  const double scale = 1.4426950408889634 / temperature * 8388608.0;
  const double largest = std::numeric_limits<float>::max();
  const double smallest = std::numeric_limits<float>::min();
  return static_cast<float>(scale < smallest ? smallest : scale < largest ? scale : largest);
}

constexpr float kLowestExponent = -127.0f * 8388608.0f;

// 2^(t / 2^23) for kLowestExponent <= t <= 0: exactly 1 for t = 0, exactly 0 at the lowest (an
// empty exponent field), between 2^-126 and 1 within 4 ulp, below that some number below it. The
// integer part of t is the exponent field already; a polynomial gives the fraction's mantissa
// (minimax of 2^(m - 1) on [1, 2), degree 5, held to 1 at m = 1). A third of the operations of
// exp_lanes. A NaN gives some finite value: callers look for NaN in t.
WINNOW_LANES f32x16 exp_scaled(f32x16 t) {
  i32x16 bits;
  for (int p = 0; p < kParts; ++p) bits.part[p] = __builtin_convertvector(t.part[p], IntPart);
  const f32x16 m = as_float((bits & 0x007fffff) | 0x3f800000);
  f32x16 y = 0x1.e9a742p-10f;
  y = fma_lanes(y, m, -0x1.520ac2p-12f);
  y = fma_lanes(y, m, 0x1.3aa508p-5f);
  y = fma_lanes(y, m, 0x1.bb2abp-4f);
  y = fma_lanes(y, m, 0x1.69f7f2p-2f);
  y = fma_lanes(y, m, 0x1.fe539cp-2f);
  return as_float(as_bits(y) + (bits & static_cast<int32_t>(0xff800000)));
}

// The exponent of each logit, clamped; NaN stays NaN.
WINNOW_LANES f32x16 scaled_exponent(f32x16 x, f32x16 reference, f32x16 scale) {
  return max_lanes(f32x16(kLowestExponent), (x - reference) * scale);
}

struct LogitBlock {
  const float* data;  // padded with -infinity to whole vectors
  int64_t vectors;
};

// n <= kLogitBlock logits of a row from vocabulary index `begin` on. A float row that needs nothing
// is read in place, everything else goes through `buffer` (kLogitBlock floats, aligned).
template <typename T>
inline LogitBlock load_logits(const LogitRows& rows, int64_t row, int64_t begin, int64_t n,
                              float* buffer) {
  const T* logits = static_cast<const T*>(rows.logits) + row * rows.stride + begin;
  const int64_t vectors = (n + kLanes - 1) / kLanes;
  int64_t suppressed = 0;
  if (rows.suppressed_count > 0) {  // the first one not below `begin`
    int64_t size = rows.suppressed_count;
    while (size > 0) {
      const int64_t half = size / 2;
      if (rows.suppressed[suppressed + half] < begin) {
        suppressed += half + 1;
        size -= half + 1;
      } else {
        size = half;
      }
    }
  }
  const bool suppresses =
      suppressed < rows.suppressed_count && rows.suppressed[suppressed] < begin + n;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (rows.unconditional == nullptr && !suppresses && n % kLanes == 0) {
      return {reinterpret_cast<const float*>(logits), vectors};
    }
  }
  const int64_t whole = n / kLanes * kLanes;
  if (rows.unconditional == nullptr) {
    for (int64_t i = 0; i < whole; i += kLanes) store_lanes(buffer + i, load_lanes(logits + i));
    if (whole < n) store_lanes(buffer + whole, load_lanes(logits + whole, n - whole, kNoLogit));
  } else {
    const T* base =
        static_cast<const T*>(rows.unconditional) + row * rows.unconditional_stride + begin;
    const f32x16 guidance = static_cast<float>(rows.guidance);
    // Equal logits stay as they are: infinite ones would become NaN.
    const auto guided = [&](f32x16 x, f32x16 u) __attribute__((always_inline)) {
      return select(x == u, x, u + guidance * (x - u));
    };
    for (int64_t i = 0; i < whole; i += kLanes) {
      store_lanes(buffer + i, guided(load_lanes(logits + i), load_lanes(base + i)));
    }
    if (whole < n) {
      store_lanes(buffer + whole, guided(load_lanes(logits + whole, n - whole, kNoLogit),
                                         load_lanes(base + whole, n - whole, kNoLogit)));
    }
  }
  for (; suppressed < rows.suppressed_count && rows.suppressed[suppressed] < begin + n;
       ++suppressed) {
    buffer[rows.suppressed[suppressed] - begin] = kNoLogit;
  }
  return {buffer, vectors};
}

template <typename T>
inline LogitBlock load_block(const LogitRows& rows, int64_t row, int64_t block, float* buffer) {
  const int64_t begin = block_begin(rows, block);
  return load_logits<T>(rows, row, begin, block_end(rows, block) - begin, buffer);
}

// Their largest, NaN aside. Four chains hide the latency.
inline float block_max(LogitBlock block) {
  f32x16 top[4] = {kNoLogit, kNoLogit, kNoLogit, kNoLogit};
  int64_t v = 0;
  for (; v + 4 <= block.vectors; v += 4) {
    for (int c = 0; c < 4; ++c) {
      top[c] = max_lanes(load_lanes(block.data + (v + c) * kLanes), top[c]);
    }
  }
  for (; v < block.vectors; ++v) top[0] = max_lanes(load_lanes(block.data + v * kLanes), top[0]);
  return max_lane(max_lanes(max_lanes(top[0], top[1]), max_lanes(top[2], top[3])));
}

inline bool any_nan(LogitBlock block) {
  i32x16 found = 0;
  for (int64_t v = 0; v < block.vectors; ++v) {
    const f32x16 x = load_lanes(block.data + v * kLanes);
    found = found | (x != x);
  }
  return any(found);
}

// Of the lanes of a block's vector.
WINNOW_LANES i32x16 vocabulary_index(int64_t begin, int64_t vector) {
  return lane_index() + static_cast<int32_t>(begin + vector * kLanes);
}

typedef double Quad64 __attribute__((vector_size(32)));

// Sums in double: a tail that single precision would round away must keep its share.
struct WideSum {
  Quad64 part[4] = {};

  // Sixteen weights.
  __attribute__((always_inline)) void add(const float* w) {
    for (int q = 0; q < 4; ++q) part[q] += __builtin_convertvector(quad(w, q), Quad64);
  }
  double total() const {
    const Quad64 all = (part[0] + part[1]) + (part[2] + part[3]);
    return (all[0] + all[2]) + (all[1] + all[3]);
  }
};

struct KeptWeights {
  f32x16 exponent;  // clamped, in units of 2^-23
  f32x16 mass;
};

// Weights of sixteen logits, exactly zero where a token must not be drawn: suppressed or truncated.
WINNOW_LANES KeptWeights kept_weights(f32x16 x, i32x16 index, float reference, float scale,
                                      const Truncation& kept) {
  const f32x16 t = scaled_exponent(x, reference, scale);
  const i32x16 tie =
      (x == f32x16(kept.threshold)) & (index < static_cast<int32_t>(kept.last_tie + 1));
  const i32x16 keeps = (x > f32x16(kept.threshold)) | tie;
  return {t, select(keeps, exp_scaled(t), f32x16(0.0f))};
}

// float, bfloat16 and half rows; double rows have a path of their own, without vectors.
template <typename Fn>
inline void dispatch_logits(ElementType type, const Fn& fn) {
  switch (type) {
    case ElementType::kBFloat16:
      return fn(c10::BFloat16{});
    case ElementType::kHalf:
      return fn(c10::Half{});
    default:
      return fn(float{});
  }
}

}  // namespace
}  // namespace winnow
