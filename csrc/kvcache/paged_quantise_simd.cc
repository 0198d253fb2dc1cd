// Stores tokens in one block of quantised pages: the scale that they need, the codes that are there
// brought to it, and theirs. Through lanes.h, so that codes and scales are bitwise the same on
// every instruction set.
#include "kvcache/paged_quantise_simd.h"

#include <type_traits>

#include "common/dispatch_simd.h"
#include "common/lanes.h"
#include "kvcache/code_numbers.h"
#include "kvcache/codes.h"

namespace winnow::CPU_CAPABILITY {
namespace {

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer

template <typename Code>
i32x16 encode(f32x16 x, float factor) {
  const f32x16 most = largest_code(code_type_of<Code>());
  const f32x16 y = max_lanes(min_lanes(x, kLargestFloat), -kLargestFloat) * factor;
  if constexpr (std::is_same_v<Code, int8_t>) {
    const f32x16 whole = max_lanes(min_lanes(y, most), f32x16(-127.0f)) + f32x16(kRound);
    return select(x == x, as_bits(whole) - as_bits(f32x16(kRound)), i32x16(0));
  } else {
    const i32x16 sign = (as_bits(x) >> 24) & 0x80;
    const f32x16 magnitude = min_lanes(as_float(as_bits(y) & 0x7fffffff), most);
    const i32x16 bits = as_bits(magnitude);
    // Rounds the mantissa to three bits, to even; below 2^-6 a code counts 2^-9, which is the last
    // place of floats from 2^14 on.
    const i32x16 normal = (((bits + 0x7ffff) + ((bits >> 20) & 1)) >> 20) - (120 << 3);
    const i32x16 subnormal = as_bits(magnitude + f32x16(0x1p14f)) - as_bits(f32x16(0x1p14f));
    const i32x16 code = select(magnitude < f32x16(0x1p-6f), subnormal, normal);
    return select(x == x, code | sign, i32x16(0x7f));
  }
}

template <typename Code>
void store_codes(Code* p, i32x16 codes, int64_t n) {
  int32_t wide[kLanes];
  std::memcpy(wide, &codes, sizeof codes);
  auto* bytes = reinterpret_cast<uint8_t*>(p);
  for (int64_t i = 0; i < n; ++i) bytes[i] = static_cast<uint8_t>(wide[i]);
}

int64_t lanes_of(int64_t left) {
  return left < kLanes ? left : kLanes;
}

template <typename T>
f32x16 load(const T* p, int64_t n) {
  return n == kLanes ? load_lanes(p) : load_lanes(p, n, 0.0f);
}

template <typename T>
float largest_of(const T* token, int64_t dim) {
  f32x16 largest = 0.0f;
  for (int64_t d = 0; d < dim; d += kLanes) {
    const f32x16 x = load(token + d, lanes_of(dim - d));
    const f32x16 magnitude = as_float(as_bits(x) & 0x7fffffff);
    // Neither an infinity nor a NaN.
    largest =
        max_lanes(largest, select(magnitude <= f32x16(kLargestFloat), magnitude, f32x16(0.0f)));
  }
  return max_lane(largest);
}

template <typename Code, typename T>
void write_block(const CodePages& pages, const NewTokens& from, const BlockWrite& write,
                 int64_t head) {
  const T* tokens =
      static_cast<const T*>(from.tokens) + write.row * from.stride[0] + head * from.stride[1];
  Code* codes =
      static_cast<Code*>(pages.codes) + write.block * pages.stride[0] + head * pages.stride[1];
  float* stored = pages.scales + write.block * pages.scale_stride[0] + head * pages.scale_stride[1];
  float largest = 0.0f;
  for (int64_t i = 0; i < write.count; ++i) {
    const float own = largest_of(tokens + write.tokens[i].token * from.stride[2], from.dim);
    largest = own > largest ? own : largest;
  }
  const float before = write.whole ? 0.0f : *stored;
  const float needed = scale_for(code_type_of<Code>(), largest);
  const float scale = needed > before ? needed : before;
  if (before > 0.0f && scale > before) {
    const float ratio = before / scale;
    for (int64_t slot = 0; slot < pages.block_size; ++slot) {
      Code* row = codes + slot * pages.stride[2];
      for (int64_t d = 0; d < from.dim; d += kLanes) {
        const int64_t n = lanes_of(from.dim - d);
        store_codes(row + d, encode<Code>(load(row + d, n), ratio), n);
      }
    }
  }
  const float inverse = inverse_of(scale);
  for (int64_t i = 0; i < write.count; ++i) {
    const T* token = tokens + write.tokens[i].token * from.stride[2];
    Code* row = codes + write.tokens[i].slot * pages.stride[2];
    for (int64_t d = 0; d < from.dim; d += kLanes) {
      const int64_t n = lanes_of(from.dim - d);
      store_codes(row + d, encode<Code>(load(token + d, n), inverse), n);
    }
  }
  *stored = scale;
}

}  // namespace

void quantise_block(const CodePages& pages, const NewTokens& from, const BlockWrite& write,
                    int64_t head) {
  dispatch_element(from.type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, double>) {
      dispatch_codes(pages.type,
                     [&](auto code) { write_block<decltype(code), T>(pages, from, write, head); });
    }
  });
}

}  // namespace winnow::CPU_CAPABILITY
