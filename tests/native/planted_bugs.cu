// Kernels that are right, and the same ones with one mistake each: what the emulator must find.
#include "common/device.h"

namespace winnow {
namespace {

constexpr int kThreads = 64;

enum class Bug : int64_t {
  kNone,
  kMissingBarrier,    // reads what another warp wrote into shared memory
  kLateBarrier,       // overwrites what another warp still reads
  kTailOffByOne,      // the bound of the last block is one too far
  kNegativeIndex,     // reads before the beginning
  kShuffleMask,       // the last warp is half empty, and the mask says that it is full
  kOwnLaneMasked,     // the mask leaves out the calling lane
  kSourceLane,        // reads a lane that the mask leaves out
  kDivergentBarrier,  // half of the block takes a barrier in another branch
  kEarlyReturn,       // threads return before a barrier that the others wait at
  kUninitialised,     // reads shared memory that nobody wrote
  kMissingWarpSync,   // lanes exchange through shared memory without ordering it
};

// Sums of neighbouring elements: y[i] = x[i] + x[i - 1], through shared memory.
template <Bug kBug>
WINNOW_KERNEL(kThreads)
neighbours(Global<const float> x, int64_t n, Global<float> y) {
  WINNOW_SHARED(float, tile, kThreads);
  const int t = thread_index();
  const int64_t i = block_index() * kThreads + t;
  const int64_t end = kBug == Bug::kTailOffByOne ? n + 1 : n;
  if (kBug == Bug::kEarlyReturn && i >= n) return;
  if (i < end && !(kBug == Bug::kUninitialised && t == 5)) tile[t] = x[i];
  if (kBug == Bug::kDivergentBarrier && t >= kWarp) {
    block_sync();
  } else if (kBug != Bug::kMissingBarrier) {
    block_sync();
  }
  if (i < end) {
    const bool reads_tile = t > 0;
    float before = 0.0f;
    if (reads_tile) {
      before = tile[t - 1];
    } else if (i > 0 || kBug == Bug::kNegativeIndex) {
      before = x[i - 1];
    }
    const float own = x[i];
    if (kBug == Bug::kLateBarrier) tile[t] = own + before;
    y[i] = own + before;
  }
}

// Inclusive sums within each warp; the lanes beyond n must not take part.
template <Bug kBug>
WINNOW_KERNEL(kThreads)
warp_sums(Global<const float> x, int64_t n, Global<float> y) {
  const int64_t i = block_index() * kThreads + thread_index();
  const uint32_t members = ballot(kFullWarp, i < n);
  if (i >= n) return;
  uint32_t mask = kBug == Bug::kShuffleMask ? kFullWarp : members;
  if (kBug == Bug::kOwnLaneMasked) mask &= ~(1u << lane_index());
  float sum = x[i];
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const float other = shuffle_up(mask, sum, offset);
    if (lane_index() >= offset) sum += other;
  }
  if (kBug == Bug::kSourceLane) sum = shuffle(mask, sum, kWarp - 1);
  y[i] = sum;
}

// Reverses each warp's values through shared memory.
template <Bug kBug>
WINNOW_KERNEL(kThreads)
reverse_warps(Global<const float> x, int64_t n, Global<float> y) {
  WINNOW_SHARED(float, tile, kThreads);
  const int t = thread_index();
  const int64_t i = block_index() * kThreads + t;
  tile[t] = i < n ? static_cast<float>(x[i]) : 0.0f;
  if (kBug != Bug::kMissingWarpSync) warp_sync(kFullWarp);
  const float mirrored = tile[t ^ (kWarp - 1)];
  if (i < n) y[i] = mirrored;
}

// Copies four at a time; x must be aligned.
WINNOW_KERNEL(kThreads) copy_vectors(Global<const float> x, int64_t n, Global<float> y) {
  const int64_t i = 4 * (block_index() * kThreads + thread_index());
  if (i + 4 <= n) store_vector(y + i, load_vector<4>(x + i));
}

template <Bug kBug>
void run(int64_t kernel, const Tensor& x, const Tensor& y) {
  const Stream stream(x);
  const int64_t n = x.numel();
  const Grid grid = {ceil_div<int64_t>(n, kThreads)};
  const auto in = global<const float>(x);
  const auto out = global<float>(y);
  if (kernel == 0) launch("neighbours", neighbours<kBug>, grid, kThreads, stream, in, n, out);
  if (kernel == 1) launch("warp_sums", warp_sums<kBug>, grid, kThreads, stream, in, n, out);
  if (kernel == 2) launch("reverse_warps", reverse_warps<kBug>, grid, kThreads, stream, in, n, out);
  if (kernel == 3) {
    launch("copy_vectors", copy_vectors, grid, kThreads, stream, in, n, out);
  }
}

template <int64_t kFirst, int64_t kLast>
void pick(int64_t bug, int64_t kernel, const Tensor& x, const Tensor& y) {
  if (bug == kFirst) return run<static_cast<Bug>(kFirst)>(kernel, x, y);
  if constexpr (kFirst < kLast) return pick<kFirst + 1, kLast>(bug, kernel, x, y);
}

Tensor planted(const Tensor& x, int64_t kernel, int64_t bug) {
  Tensor y = empty(shape(x), ScalarType::Float, x);
  pick<0, static_cast<int64_t>(Bug::kMissingWarpSync)>(bug, kernel, x, y);
  return y;
}

}  // namespace
}  // namespace winnow

STABLE_TORCH_LIBRARY_FRAGMENT(winnow_on_host, m) {
  m.def("planted_bug(Tensor x, int kernel, int bug) -> Tensor");
}

WINNOW_DEVICE_OPERATORS(m) {
  m.impl("planted_bug", TORCH_BOX(&winnow::planted));
}
