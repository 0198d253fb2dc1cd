// The residual of a rejected draft, block after block of 1024 tokens: both rows are weighed into
// one block of floats, which never leaves the first-level cache, and summed in double.
#include "unmasking/speculative_verify_simd.h"

#include "common/dispatch_simd.h"
#include "unmasking/logit_block.h"

namespace winnow::CPU_CAPABILITY {
namespace {

typedef double Quad64 __attribute__((vector_size(32)));

WINNOW_LANES f32x16 probability(f32x16 x, float reference, float scale, float share) {
  const f32x16 t = scaled_exponent(x, reference, scale);
  return select(t > f32x16(kLowestExponent), exp_scaled(t) * f32x16(share), f32x16(0.0f));
}

template <typename T>
class Residual {
 public:
  Residual(const LogitRows& target, const LogitRows& draft, const ResidualRow& row,
           double temperature)
      : target_(target), draft_(draft), row_(row), scale_(exponent_scale(temperature)) {}

  double sum_slice(int64_t slice) {
    double sum = 0.0;
    const int64_t end = slice_end(target_, slice);
    for (int64_t begin = slice * kLogitSlice; begin < end; begin += kLogitBlock)
      sum += weigh(begin);
    return sum;
  }

  int64_t draw(int64_t slice, double uniform) {
    constexpr int64_t kBlocks = kLogitSlice / kLogitBlock;
    const int64_t start = slice * kLogitSlice;
    const int64_t end = slice_end(target_, slice);
    double masses[kBlocks] = {};
    double total = 0.0;
    for (int64_t begin = start, b = 0; begin < end; begin += kLogitBlock, ++b) {
      masses[b] = weigh(begin);
      total += masses[b];
    }
    // Rounding may leave the cumulated weight just short of the target: the last block or token
    // that has any is then the one.
    double left = uniform * total;
    int64_t block = -1;
    for (int64_t b = 0; b < kBlocks; ++b) {
      if (!(masses[b] > 0.0)) continue;
      if (block >= 0) left -= masses[block];
      block = b;
      if (left < masses[b]) break;
    }
    if (block < 0) return -1;
    const int64_t begin = start + block * kLogitBlock;
    weigh(begin);
    int64_t token = -1;
    for (int64_t i = 0; i < block_length(target_, begin); ++i) {
      if (!(weights_[i] > 0.0f)) continue;
      token = begin + i;
      if (left < weights_[i]) break;
      left -= weights_[i];
    }
    return token;
  }

 private:
  // Fills weights_ and returns their sum.
  double weigh(int64_t begin) {
    const int64_t n = block_length(target_, begin);
    const LogitBlock p = load_block<T>(target_, row_.target, begin, n, target_buffer_);
    LogitBlock q = {nullptr, 0};
    if (row_.draft >= 0) q = load_block<T>(draft_, row_.draft, begin, n, draft_buffer_);
    const i32x16 excluded = static_cast<int32_t>(row_.excluded - begin);
    Quad64 sum[4] = {};
    for (int64_t v = 0; v < p.vectors; ++v) {
      f32x16 w = probability(load_lanes(p.data + v * kLanes), row_.target_reference, scale_,
                             row_.target_share);
      if (q.data != nullptr) {
        w = w - probability(load_lanes(q.data + v * kLanes), row_.draft_reference, scale_,
                            row_.draft_share);
        w = max_lanes(w, 0.0f);
      }
      const i32x16 index = lane_index() + static_cast<int32_t>(v * kLanes);
      w = select(index == excluded, f32x16(0.0f), w);
      store_lanes(weights_ + v * kLanes, w);
      for (int i = 0; i < 4; ++i) {
        sum[i] += __builtin_convertvector(quad(weights_ + v * kLanes, i), Quad64);
      }
    }
    const Quad64 all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    return (all[0] + all[2]) + (all[1] + all[3]);
  }

  const LogitRows& target_;
  const LogitRows& draft_;
  const ResidualRow& row_;
  const float scale_;
  alignas(64) float target_buffer_[kLogitBlock];
  alignas(64) float draft_buffer_[kLogitBlock];
  alignas(64) float weights_[kLogitBlock];
};

}  // namespace

void sum_residual_slice(const LogitRows& target, const LogitRows& draft, const ResidualRow& row,
                        double temperature, int64_t slice, double* mass) {
  dispatch_logits(target.type, [&](auto zero) {
    *mass = Residual<decltype(zero)>(target, draft, row, temperature).sum_slice(slice);
  });
}

void draw_in_residual_slice(const LogitRows& target, const LogitRows& draft, const ResidualRow& row,
                            double temperature, int64_t slice, double uniform, int64_t* token) {
  dispatch_logits(target.type, [&](auto zero) {
    *token = Residual<decltype(zero)>(target, draft, row, temperature).draw(slice, uniform);
  });
}

}  // namespace winnow::CPU_CAPABILITY
