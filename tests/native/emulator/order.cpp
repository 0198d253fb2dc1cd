// The order in which blocks and threads take their turns, set by tests: a kernel's result must not
// depend on it.
#include "block.h"

extern "C" __attribute__((visibility("default"))) void winnow_on_host_set_order(int order) {
  winnow::host::Block::current().order = static_cast<winnow::host::Order>(order);
}
