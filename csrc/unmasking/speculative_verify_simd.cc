// The residual of a rejected draft, block after block of 1024 tokens: both rows are weighed into
// one block of floats, which never leaves the first-level cache, and summed in double.
#include "unmasking/speculative_verify_simd.h"

#include "unmasking/logit_block.h"

namespace winnow::CPU_CAPABILITY {
namespace {

WINNOW_LANES f32x16 probability(f32x16 x, float reference, float scale, float share) {
  return exp_scaled(scaled_exponent(x, reference, scale)) * f32x16(share);
}

template <typename T>
class Residual {
 public:
  Residual(const LogitRows& target, const LogitRows& draft, const ResidualRow& row,
           double temperature)
      : target_(target), draft_(draft), row_(row), scale_(exponent_scale(temperature)) {}

  int64_t draw(int64_t block, double uniform) {
    double left = uniform * weigh(block);
    const int64_t begin = block_begin(target_, block);
    const int64_t n = block_end(target_, block) - begin;
    int64_t token = -1;
    for (int64_t i = 0; i < n; ++i) {
      if (!(weights_[i] > 0.0f)) continue;
      token = begin + i;  // the last that has any, where rounding leaves the sum just short
      if (left < weights_[i]) break;
      left -= weights_[i];
    }
    return token;
  }

  // Fills weights_ and returns their sum.
  double weigh(int64_t block) {
    const LogitBlock p = load_block<T>(target_, row_.target, block, target_buffer_);
    LogitBlock q = {nullptr, 0};
    if (row_.draft >= 0) q = load_block<T>(draft_, row_.draft, block, draft_buffer_);
    const i32x16 excluded = static_cast<int32_t>(row_.excluded - block_begin(target_, block));
    WideSum sum;
    for (int64_t v = 0; v < p.vectors; ++v) {
      f32x16 w = probability(load_lanes(p.data + v * kLanes), row_.target_reference, scale_,
                             row_.target_share);
      if (q.data != nullptr) {
        w = w - probability(load_lanes(q.data + v * kLanes), row_.draft_reference, scale_,
                            row_.draft_share);
        w = max_lanes(w, 0.0f);
      }
      w = select(vocabulary_index(0, v) == excluded, f32x16(0.0f), w);
      store_lanes(weights_ + v * kLanes, w);
      sum.add(weights_ + v * kLanes);
    }
    return sum.total();
  }

 private:
  const LogitRows& target_;
  const LogitRows& draft_;
  const ResidualRow& row_;
  const float scale_;
  alignas(64) float target_buffer_[kLogitBlock];
  alignas(64) float draft_buffer_[kLogitBlock];
  alignas(64) float weights_[kLogitBlock];
};

}  // namespace

void sum_residual_block(const LogitRows& target, const LogitRows& draft, const ResidualRow& row,
                        double temperature, int64_t block, double* mass) {
  dispatch_logits(target.type, [&](auto zero) {
    *mass = Residual<decltype(zero)>(target, draft, row, temperature).weigh(block);
  });
}

void draw_in_residual_block(const LogitRows& target, const LogitRows& draft, const ResidualRow& row,
                            double temperature, int64_t block, double uniform, int64_t* token) {
  dispatch_logits(target.type, [&](auto zero) {
    *token = Residual<decltype(zero)>(target, draft, row, temperature).draw(block, uniform);
  });
}

}  // namespace winnow::CPU_CAPABILITY
