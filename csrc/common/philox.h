// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a draw is
// a pure function of (seed, row, element), so it depends on neither threads nor batch nor
// instruction set. Included by *_simd.cc too, hence internal linkage; constexpr, so that kernels
// may call it.
#pragma once

#include <cstdint>

namespace winnow {
namespace {

struct Philox4 {
  uint32_t x[4];
};

constexpr Philox4 philox(uint64_t seed, uint64_t row, uint64_t element) {
  uint32_t c[4] = {static_cast<uint32_t>(element), static_cast<uint32_t>(element >> 32),
                   static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32)};
  uint32_t k0 = static_cast<uint32_t>(seed);
  uint32_t k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c[0];
    const uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c[2];
    const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
    const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[1] = static_cast<uint32_t>(p1);
    c[3] = static_cast<uint32_t>(p0);
    c[0] = n0;
    c[2] = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c[0], c[1], c[2], c[3]}};
}

// 64 uniform bits.
[[maybe_unused]] constexpr uint64_t philox_bits(uint64_t seed, uint64_t row, uint64_t element) {
  const Philox4 r = philox(seed, row, element);
  return (static_cast<uint64_t>(r.x[1]) << 32) | r.x[0];
}

}  // namespace
}  // namespace winnow
