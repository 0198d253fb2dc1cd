// winnow::cat_attention on the GPU.
#include "attention/cat_attention.h"

#include "common/device.h"

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("cat_attention", TORCH_BOX(&winnow::cat_attention));
  m.impl("cat_attention_backward", TORCH_BOX(&winnow::cat_attention_backward));
}
