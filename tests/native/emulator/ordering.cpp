#include "ordering.h"

namespace winnow::host {
namespace {

constexpr size_t kWarpLanes = 32;

}  // namespace

void Ordering::start_block(int threads) {
  now_ = barrier_ = 1;
  const size_t warps = (static_cast<size_t>(threads) + kWarpLanes - 1) / kWarpLanes;
  lanes_.assign(warps * kWarpLanes * kWarpLanes, 0);
}

void Ordering::order_lanes(int warp, uint32_t mask) {
  ++now_;
  uint32_t* met = lanes_.data() + static_cast<size_t>(warp) * kWarpLanes * kWarpLanes;
  for (size_t a = 0; a < kWarpLanes; ++a) {
    for (size_t b = 0; b < kWarpLanes; ++b) {
      if ((mask >> a & 1) != 0 && (mask >> b & 1) != 0) met[a * kWarpLanes + b] = now_;
    }
  }
}

bool Ordering::met_since(uint32_t time, int earlier, int thread) const {
  const auto own = static_cast<size_t>(thread);
  const auto other = static_cast<size_t>(earlier);
  if (other / kWarpLanes != own / kWarpLanes) return false;
  return time < lanes_[own * kWarpLanes + other % kWarpLanes];
}

}  // namespace winnow::host
