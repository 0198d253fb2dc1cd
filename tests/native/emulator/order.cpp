// What tests set and ask: the order in which blocks and threads take their turns, on which a
// kernel's result must not depend, and how many kernels have been launched.
#include "block.h"

extern "C" __attribute__((visibility("default"))) void winnow_on_host_set_order(int order) {
  winnow::host::Block::current().order = static_cast<winnow::host::Order>(order);
}

extern "C" __attribute__((visibility("default"))) int64_t winnow_on_host_launches() {
  return winnow::host::Block::current().launches;
}
