// What the CPU and the GPU share of `resample`: the schemes by name, bits of the status, and the
// sizes in which work is split.
#pragma once

#include <cstdint>

namespace winnow {

enum class Scheme : int {
  kSystematic,
  kStratified,
  kMultinomial,
  kResidual,
  kSsp,
  kKilling,
  kOptimal
};

// Bits of `status`; torch_winnow.resampling.Status names them for users.
constexpr int32_t kStatusNoWeight = 1;
constexpr int32_t kStatusNan = 2;
constexpr int32_t kStatusInfinite = 4;
constexpr int32_t kStatusNothingLive = 8;

// Work is split in blocks of this size whatever the number of threads, so that results never depend
// on it. 8192 float weights are 32 KB: a block stays in the first-level cache between its passes.
constexpr int64_t kBlock = 8192;

// Particles whose remainders ssp pairs one after another.
constexpr int64_t kRun = 64;

// Elements of a population's uniforms that no scheme uses, for a pinned particle.
constexpr int64_t kPinnedPoint = INT64_MAX;
constexpr int64_t kPinnedCopy = INT64_MAX - 1;

}  // namespace winnow
