// winnow::block_diagonal_attention on the GPU.
#include "attention/block_diagonal_attention.h"

#include "common/device.h"

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("block_diagonal_attention", TORCH_BOX(&winnow::block_diagonal_attention));
  m.impl("block_diagonal_attention_backward",
         TORCH_BOX(&winnow::block_diagonal_attention_backward));
}
