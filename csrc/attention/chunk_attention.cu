// winnow::chunk_attention on the GPU.
#include "attention/chunk_attention.h"

#include "common/device.h"

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("chunk_attention", TORCH_BOX(&winnow::chunk_attention));
  m.impl("chunk_attention_backward", TORCH_BOX(&winnow::chunk_attention_backward));
}
