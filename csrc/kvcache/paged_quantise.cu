// winnow::paged_quantise_ on the GPU. A warp stores what one row has for one block of one head: the
// warp of the first of these tokens finds the others, the scale that they need, brings the codes
// that are there to it and adds theirs, lanes side by side along D. Positions and blocks stay on
// the device, so what they hold is not checked: an index outside of the pages stores nothing.
#include "common/device.h"
#include "kvcache/codes.h"
#include "kvcache/paged_write_arguments.h"
#include "kvcache/quantised.h"
#include "kvcache/write_positions.cuh"

namespace winnow {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;

// New tokens in any floating dtype; one of the pointers is set. Strides in elements.
struct NewTokens {
  Global<const float> as_float;
  Global<const c10::BFloat16> as_bfloat16;
  Global<const c10::Half> as_half;
  int64_t stride[3];  // row, head, token
  int64_t dim;

  WINNOW_DEVICE float at(int64_t i) const {
    if (as_float) return as_float[i];
    if (as_bfloat16) return static_cast<float>(static_cast<c10::BFloat16>(as_bfloat16[i]));
    return static_cast<float>(static_cast<c10::Half>(as_half[i]));
  }
};

template <typename Code>
struct CodePages {
  Global<Code> codes;
  int64_t stride[3];  // block, head, slot
  Global<float> scales;
  int64_t scale_stride[2];  // block, head
};

// What one row stores in one block.
struct Visit {
  int64_t row;
  int64_t head;
  int64_t entry;  // of the block table
  int64_t block;
  int64_t first;  // token
  bool whole;     // every slot of the block is written
};

template <typename Code>
WINNOW_DEVICE void store(const CodePages<Code>& pages, const NewTokens& from,
                         const Positions& where, const Visit& visit) {
  const int64_t source = visit.row * from.stride[0] + visit.head * from.stride[1];
  const auto codes = pages.codes + visit.block * pages.stride[0] + visit.head * pages.stride[1];
  const auto stored =
      pages.scales + visit.block * pages.scale_stride[0] + visit.head * pages.scale_stride[1];
  // fn(token, slot) of every token of the block, in order.
  const auto for_each = [&](const auto& fn) {
    for (int64_t t = visit.first; t < where.tokens; ++t) {
      const int64_t position = where.at(visit.row, t);
      if (position >= 0 && position / where.block_size == visit.entry) {
        fn(t, position % where.block_size);
      }
    }
  };
  float largest = 0.0f;
  for_each([&](int64_t token, int64_t) {
    for (int64_t d = lane_index(); d < from.dim; d += kWarp) {
      const float x = from.at(source + token * from.stride[2] + d);
      const float magnitude = x < 0.0f ? -x : x;
      // Neither an infinity nor a NaN.
      if (magnitude <= kLargestFloat && magnitude > largest) largest = magnitude;
    }
  });
  largest = warp_reduce(largest, [](float a, float b) { return a > b ? a : b; });
  const float before = visit.whole ? 0.0f : static_cast<float>(*stored);
  const float needed = scale_for(code_type_of<Code>(), largest);
  const float scale = needed > before ? needed : before;
  warp_sync(kFullWarp);  // everyone has read the scale
  if (before > 0.0f && scale > before) {
    const float ratio = before / scale;
    for (int64_t slot = 0; slot < where.block_size; ++slot) {
      for (int64_t d = lane_index(); d < from.dim; d += kWarp) {
        const int64_t at = slot * pages.stride[2] + d;
        Code code = codes[at];
        encode(number_of(code), ratio, &code);
        codes[at] = code;
      }
    }
  }
  const float inverse = inverse_of(scale);
  for_each([&](int64_t token, int64_t slot) {
    for (int64_t d = lane_index(); d < from.dim; d += kWarp) {
      Code code;
      encode(from.at(source + token * from.stride[2] + d), inverse, &code);
      codes[slot * pages.stride[2] + d] = code;
    }
  });
  if (lane_index() == 0) *stored = scale;
}

template <typename Code>
WINNOW_KERNEL(kThreads)
quantise_tokens(CodePages<Code> key_pages, CodePages<Code> value_pages, NewTokens keys,
                NewTokens values, Positions where) {
  const int64_t item = block_index() * kWarps + warp_index();
  if (item >= where.items) return;
  Visit visit;
  visit.first = item % where.tokens;
  visit.head = item / where.tokens % where.heads;
  visit.row = item / where.tokens / where.heads;
  const int64_t position = where.at(visit.row, visit.first);
  if (position < 0) return;
  visit.entry = position / where.block_size;
  visit.block =
      static_cast<int32_t>(where.block_table[visit.row * where.table_stride + visit.entry]);
  if (visit.block < 0 || visit.block >= where.num_blocks) return;
  const auto in_block = [&](int64_t token) {
    const int64_t other = where.at(visit.row, token);
    return other >= 0 && other / where.block_size == visit.entry;
  };
  // An earlier token's warp does it; the one before is the likeliest.
  if (visit.first > 0 && in_block(visit.first - 1)) return;
  bool earlier = false;
  for (int64_t t = lane_index(); t < visit.first; t += kWarp) earlier = earlier || in_block(t);
  if (ballot(kFullWarp, earlier) != 0) return;

  visit.whole = where.tokens - visit.first >= where.block_size;
  if (visit.whole) {
    bool missing = false;
    for (int64_t slot = lane_index(); slot < where.block_size && !missing; slot += kWarp) {
      const int64_t wanted = visit.entry * where.block_size + slot;
      // In an append it lies at its distance.
      const int64_t guess = visit.first + wanted - position;
      bool found =
          guess >= visit.first && guess < where.tokens && where.at(visit.row, guess) == wanted;
      for (int64_t t = visit.first; t < where.tokens && !found; ++t) {
        found = where.at(visit.row, t) == wanted;
      }
      missing = !found;
    }
    visit.whole = ballot(kFullWarp, missing) == 0;
  }
  store(key_pages, keys, where, visit);
  store(value_pages, values, where, visit);
}

// ---- launchers ----

NewTokens tokens_of(const char* name, const Tensor& tensor) {
  NewTokens tokens = {};
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      tokens.as_float = global<const float>(tensor);
      break;
    case ScalarType::BFloat16:
      tokens.as_bfloat16 = global<const c10::BFloat16>(tensor);
      break;
    case ScalarType::Half:
      tokens.as_half = global<const c10::Half>(tensor);
      break;
    default:
      fail(name, ": expected float32, bfloat16 or float16, got ", name_of(tensor.scalar_type()));
  }
  for (int64_t d = 0; d < 3; ++d) tokens.stride[d] = tensor.stride(d);
  tokens.dim = tensor.size(3);
  return tokens;
}

template <typename Code>
CodePages<Code> pages_of(const Tensor& tensor, const Tensor& scales) {
  CodePages<Code> pages = {};
  pages.codes = global<Code>(tensor);
  for (int64_t d = 0; d < 3; ++d) pages.stride[d] = tensor.stride(d);
  pages.scales = global<float>(scales);
  for (int64_t d = 0; d < 2; ++d) pages.scale_stride[d] = scales.stride(d);
  return pages;
}

void paged_quantise_cuda(Tensor key_pages, Tensor value_pages, Tensor key_scales,
                         Tensor value_scales, const Tensor& key, const Tensor& value,
                         const Tensor& block_table, const Tensor& positions) {
  check_write(key_pages, value_pages, key, value, block_table, positions, check_device);
  check_device("key_scales", key_scales);
  check_device("value_scales", value_scales);
  check_scales("key_scales", key_scales, key_pages);
  check_scales("value_scales", value_scales, value_pages);
  const CodeType type = code_type("key_pages", key_pages);
  check_dtype("value_pages", value_pages, key_pages.scalar_type());
  const Stream stream(key);
  const NewTokens keys = tokens_of("key", key);
  const NewTokens values = tokens_of("value", value);
  const Positions where = positions_of(key, key_pages, block_table, positions);
  const auto run = [&](auto zero) {
    using Code = decltype(zero);
    launch("paged_quantise_", quantise_tokens<Code>, {ceil_div<int64_t>(where.items, kWarps)},
           kThreads, stream, pages_of<Code>(key_pages, key_scales),
           pages_of<Code>(value_pages, value_scales), keys, values, where);
  };
  dispatch_codes(type, run);
}

}  // namespace
}  // namespace winnow

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("paged_quantise_", TORCH_BOX(&winnow::paged_quantise_cuda));
}
