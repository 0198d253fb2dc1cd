#pragma once

#include <cstdint>

#include "common/cpu_capability.h"
#include "common/element_type.h"
#include "kvcache/codes.h"

namespace winnow {

// The codes and scales of one layer's keys or values.
struct CodePages {
  CodeType type;
  void* codes;
  int64_t stride[3];  // block, head, slot
  float* scales;
  int64_t scale_stride[2];  // block, head
  int64_t block_size;
};

struct NewTokens {
  ElementType type;
  const void* tokens;
  int64_t stride[3];  // row, head, token
  int64_t dim;
};

struct SlotToken {
  int64_t slot;
  int64_t token;
};

// What one row stores in one block; of equal slots the last wins.
struct BlockWrite {
  int64_t row;
  int64_t block;
  const SlotToken* tokens;
  int64_t count;
  bool whole;  // every slot of the block is written
};

WINNOW_SIMD_DECLARE(quantise_block, const CodePages& pages, const NewTokens& from,
                    const BlockWrite& write, int64_t head)

}  // namespace winnow
