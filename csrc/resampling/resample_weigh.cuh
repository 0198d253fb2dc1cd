// Log weights to weights on the GPU, bitwise as weigh.h and fixed_point.h do it: the same
// polynomials, term by term, and sums in the same order, because the fixed-point scale and the
// decision to resample depend on their last bit. (Compiled without fused multiply-adds.)
#pragma once

#include "common/device.h"
#include "resampling/exact.h"

namespace winnow {
namespace {

template <typename To, typename From>
WINNOW_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// exp_lanes of x <= 0 or NaN.
WINNOW_DEVICE float exp_weight(float x) {
  if (!(x >= -87.33f)) return 0.0f;
  const float magic = 12582912.0f;
  const float k = x * 1.44269504088896341f + magic;
  const float n = k - magic;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  const int32_t whole = bits_as<int32_t>(k) - bits_as<int32_t>(magic);
  const int32_t half = whole >> 1;
  return p * bits_as<float>((half + 127) << 23) * bits_as<float>((whole - half + 127) << 23);
}

// exp_wide.
WINNOW_CALLED double exp_weight(double x) {
  if (!(x >= -708.0)) return 0.0;
  const double magic = 0x1.8p52;
  const double n = (x * 1.44269504088896340736 + magic) - magic;
  const double t = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  constexpr double kInverseFactorial[] = {1.0,
                                          1.0,
                                          1.0 / 2,
                                          1.0 / 6,
                                          1.0 / 24,
                                          1.0 / 120,
                                          1.0 / 720,
                                          1.0 / 5040,
                                          1.0 / 40320,
                                          1.0 / 362880,
                                          1.0 / 3628800,
                                          1.0 / 39916800,
                                          1.0 / 479001600,
                                          1.0 / 6227020800.0};
  double sum = kInverseFactorial[13];
  for (int degree = 12; degree >= 0; --degree) sum = sum * t + kInverseFactorial[degree];
  return sum * bits_as<double>((static_cast<int64_t>(n) + 1023) << 52);
}

// log_wide.
WINNOW_CALLED double log_number(double x) {
  constexpr double kInverseOdd[] = {1.0 / 3,  1.0 / 5,  1.0 / 7,  1.0 / 9,  1.0 / 11,
                                    1.0 / 13, 1.0 / 15, 1.0 / 17, 1.0 / 19, 1.0 / 21};
  constexpr int64_t kRootHalf = 0x3fe6a09e667f3bcd;
  const int64_t shifted = bits_as<int64_t>(x) - kRootHalf;
  const double m = bits_as<double>((shifted & 0xfffffffffffff) + kRootHalf);
  const auto e = static_cast<double>(shifted >> 52);
  const double s = (m - 1.0) / (m + 1.0);
  const double z = s * s;
  double sum = kInverseOdd[9];
  for (int i = 8; i >= 0; --i) sum = sum * z + kInverseOdd[i];
  const double tail = s * z * sum + e * 0.5 * 1.90821492927058770002e-10;
  return e * 6.93147180369123816490e-01 + 2.0 * (s + tail);
}

// block_weights of one particle: in float where the weights are.
WINNOW_DEVICE double weight_of(double x, double top, bool narrow) {
  if (top == std::numeric_limits<double>::infinity()) return x == top ? 1.0 : 0.0;
  if (!narrow) return exp_weight(x - top);
  return static_cast<double>(exp_weight(static_cast<float>(x) - static_cast<float>(top)));
}

// A NaN as no weight.
WINNOW_DEVICE double carried(double x) {
  return x == x ? x : -std::numeric_limits<double>::infinity();
}

// The sums of n weights and of their squares in the order of block_sums: sixteen running sums, then
// halves. One half of a warp has the weights, the other the squares; every lane gets both.
template <typename Real>
WINNOW_DEVICE void ordered_sums(Global<const Real> weights, int64_t n, double* sum,
                                double* squares) {
  const int lane = lane_index() % 16;
  const bool squared = lane_index() >= 16;
  double running = 0.0;
  for (int64_t i = lane; i < n; i += 16) {
    const Real weight = weights[i];
    const auto w = static_cast<double>(weight);
    running += squared ? w * w : w;
  }
  for (int offset = 8; offset > 0; offset /= 2) {
    running += shuffle_xor(kFullWarp, running, offset);
  }
  *squares = shuffle(kFullWarp, running, 16);
  *sum = shuffle(kFullWarp, running, 0);
}

}  // namespace
}  // namespace winnow
