// The nucleus of a row as a list, and the weighted sum of the embedding rows that it names: four of
// them at a time, so that the sum passes through the cache a quarter as often.
#include "unmasking/soft_embedding_simd.h"

#include <type_traits>

#include "common/narrow_lanes.h"
#include "unmasking/logit_block.h"

namespace winnow::CPU_CAPABILITY {
namespace {

constexpr int64_t kRows = 4;

template <typename T>
WINNOW_LANES f32x16 load_part(const T* p, int64_t n) {
  return n >= kLanes ? load_lanes(p) : load_lanes(p, n, 0.0f);
}

template <typename T>
WINNOW_LANES void store_part(T* out, f32x16 v, int64_t n) {
  if constexpr (std::is_same_v<T, float>) {
    if (n >= kLanes) return store_lanes(out, v);
  }
  store_first(out, v, n < kLanes ? n : kLanes);
}

template <typename T>
void mix(const T* matrix, int64_t stride, int64_t width, const int64_t* ids, const float* weights,
         int64_t count, float share, const T* base, float base_share, float* sum, T* out) {
  for (int64_t i = 0; i < width; ++i) sum[i] = 0.0f;
  for (int64_t i = 0; i < count; i += kRows) {
    const T* row[kRows];
    f32x16 weight[kRows];
    for (int64_t r = 0; r < kRows; ++r) {  // the last ones repeat a row without weight
      const bool within = i + r < count;
      row[r] = matrix + ids[within ? i + r : i] * stride;
      weight[r] = within ? weights[i + r] : 0.0f;
    }
    const int64_t rows = count - i < kRows ? count - i : kRows;
    for (int64_t e = 0; e < width; e += kLanes) {
      f32x16 s = load_part(sum + e, width - e);
      for (int64_t r = 0; r < rows; ++r) {
        s = fma_lanes(weight[r], load_part(row[r] + e, width - e), s);
      }
      store_part(sum + e, s, width - e);
    }
  }
  for (int64_t e = 0; e < width; e += kLanes) {
    f32x16 v = load_part(sum + e, width - e) * f32x16(share);
    if (base_share != 0.0f) {
      v = fma_lanes(f32x16(base_share), load_part(base + e, width - e), v);
    }
    store_part(out + e, v, width - e);
  }
}

}  // namespace

void collect_kept(const LogitRows& rows, int64_t row, float reference, double temperature,
                  const Truncation& kept, int64_t* ids, float* weights, int64_t* count) {
  const float scale = exponent_scale(temperature);
  int64_t n = 0;
  dispatch_logits(rows.type, [&](auto zero) {
    alignas(64) float buffer[kLogitBlock];
    for (int64_t b = 0; b < logit_blocks(rows.start, rows.vocab); ++b) {
      const LogitBlock block = load_block<decltype(zero)>(rows, row, b, buffer);
      const int64_t begin = block_begin(rows, b);
      for (int64_t v = 0; v < block.vectors; ++v) {
        const f32x16 x = load_lanes(block.data + v * kLanes);
        if (!any(x >= f32x16(kept.threshold))) continue;
        const f32x16 mass =
            kept_weights(x, vocabulary_index(begin, v), reference, scale, kept).mass;
        alignas(64) float w[kLanes];
        store_lanes(w, mass);
        for (int i = 0; i < kLanes; ++i) {
          if (!(w[i] > 0.0f)) continue;
          ids[n] = begin + v * kLanes + i;
          weights[n++] = w[i];
        }
      }
    }
  });
  *count = n;
}

void mix_rows(ElementType type, const void* matrix, int64_t stride, int64_t width,
              const int64_t* ids, const float* weights, int64_t count, float share,
              const void* base, float base_share, float* scratch, void* out) {
  dispatch_logits(type, [&](auto zero) {
    using T = decltype(zero);
    mix(static_cast<const T*>(matrix), stride, width, ids, weights, count, share,
        static_cast<const T*>(base), base_share, scratch, static_cast<T*>(out));
  });
}

}  // namespace winnow::CPU_CAPABILITY
