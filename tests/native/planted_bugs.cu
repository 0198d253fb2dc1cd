// Kernels that are right, and the same ones with one mistake each: what the emulator must find.
#include "common/device.h"

namespace winnow {
namespace {

constexpr int kThreads = 64;

enum class Bug : int64_t {
  kNone,
  kMissingBarrier,      // reads what another warp wrote into shared memory
  kLateBarrier,         // overwrites what another warp still reads
  kTailOffByOne,        // the bound of the last block is one too far
  kNegativeIndex,       // reads before the beginning
  kShuffleMask,         // the last warp is half empty, and the mask says that it is full
  kOwnLaneMasked,       // the mask leaves out the calling lane
  kSourceLane,          // reads a lane that the mask leaves out
  kDivergentBarrier,    // half of the block takes a barrier in another branch
  kEarlyReturn,         // threads return before a barrier that the others wait at
  kUninitialised,       // reads shared memory that nobody wrote
  kMissingWarpSync,     // lanes exchange through shared memory without ordering it
  kMissingWait,         // reads what is still being copied
  kEarlyWait,           // waits for the group before the one that it reads
  kWaitNoBarrier,       // reads another thread's copy after its own wait alone
  kUnfinishedCopy,      // returns before the last copy has arrived
  kSharedTooSmall,      // asks for less dynamic shared memory than it uses
  kFragmentColumn,      // a matrix of the left factor stands in another's place
  kFragmentTransposed,  // the right factor is loaded as it lies
  kNotTogether,         // blocks wait for others that have not begun
  kMissingBlock,        // one of the blocks that the others wait for never comes
  kUnorderedRead,       // reads global memory that another warp writes
  kUnorderedWrite,      // writes global memory that another warp still reads
  kUnorderedLanes,      // lanes exchange through global memory without ordering it
  kOtherBlock,          // reads what another block writes
  kOneTarget,           // every block writes the same element
  kPlainSum,            // adds without an atomic operation
  kEarlySum,            // reads a sum that others still add to
  kSharedByte,          // neighbouring threads write the same byte
};
constexpr Bug kLastBug = Bug::kSharedByte;

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

// Reverses each block's values through y, and then each warp's.
template <Bug kBug>
WINNOW_KERNEL(kThreads)
through_memory(Global<const float> x, int64_t n, Global<float> y) {
  const int t = thread_index();
  const int64_t first = block_index() * kThreads;
  if (first + kThreads > n) return;
  const float own = x[first + t];
  y[first + t] = own;
  if (kBug != Bug::kUnorderedRead) block_sync();
  int64_t from = first + kThreads - 1 - t;
  if (kBug == Bug::kOtherBlock) from = n - 1 - first - t;
  const float mirrored = y[from];
  if (kBug != Bug::kUnorderedWrite) block_sync();
  y[kBug == Bug::kOneTarget ? t : first + t] = mirrored;
  if (kBug != Bug::kUnorderedLanes) warp_sync(kFullWarp);
  const float back = y[first + (t ^ (kWarp - 1))];
  warp_sync(kFullWarp);
  y[first + t] = back;
}

// The sum of the whole, in whole numbers, in y[0], and of each block in y[1 + block].
template <Bug kBug>
WINNOW_KERNEL(kThreads)
add_up(Global<const float> x, int64_t n, Global<float> y) {
  const int64_t i = block_index() * kThreads + thread_index();
  const float own = i < n ? static_cast<float>(static_cast<int>(x[i])) : 0.0f;
  const auto sum = y + (1 + block_index());
  if (thread_index() == 0) *sum = 0.0f;
  block_sync();
  if (kBug == Bug::kPlainSum) {
    *sum += own;
  } else {
    atomic_add(sum, own);
  }
  if (kBug != Bug::kEarlySum) block_sync();
  if (thread_index() == 0) atomic_add(y, static_cast<float>(*sum));
}

// A byte for each element: whether it is positive.
template <Bug kBug>
WINNOW_KERNEL(kThreads)
signs(Global<const float> x, int64_t n, Global<uint8_t> y) {
  const int64_t i = block_index() * kThreads + thread_index();
  if (i >= n) return;
  const float own = x[i];
  y[kBug == Bug::kSharedByte ? i / 2 : i] = static_cast<uint8_t>(own > 0.0f);
}

// Copies four at a time; x must be aligned.
WINNOW_KERNEL(kThreads) copy_vectors(Global<const float> x, int64_t n, Global<float> y) {
  const int64_t i = 4 * (block_index() * kThreads + thread_index());
  if (i + 4 <= n) store_vector(y + i, load_vector<4>(x + i));
}

// Reverses each block's values, copied in two groups: what the first brings is used while the
// second is under way.
template <Bug kBug>
WINNOW_KERNEL(kThreads)
copied(Global<const float> x, int64_t n, Global<float> y) {
  const auto tiles = dynamic_shared<float>(0, 2 * kThreads * 4);
  const int t = thread_index();
  const int64_t vectors = n / 4;
  for (int half = 0; half < 2; ++half) {
    const int64_t v = (block_index() * 2 + half) * kThreads + t;
    copy_async(tiles + (half * kThreads + t) * 4, x + (v < vectors ? 4 * v : 0), v < vectors);
    copy_commit();
  }
  for (int half = 0; half < 2; ++half) {
    if (half == 0 && kBug != Bug::kMissingWait) copy_wait<1>();
    if (half == 1) {
      if (kBug == Bug::kEarlyWait) {
        copy_wait<1>();
      } else if (kBug != Bug::kUnfinishedCopy) {
        copy_wait<0>();
      }
    }
    if (kBug != Bug::kWaitNoBarrier) block_sync();
    if (half == 1 && kBug == Bug::kUnfinishedCopy) return;
    const int64_t v = (block_index() * 2 + half) * kThreads + t;
    const auto mirrored = load_vector<4>(tiles + (half * kThreads + (kThreads - 1 - t)) * 4);
    if (v < vectors) store_vector(y + 4 * v, mirrored);
  }
}

// y (16, 16) = a (16, 16) * b (16, 16), each warp by itself; x holds a, then b.
template <Bug kBug, typename T>
WINNOW_KERNEL(kThreads)
products(Global<const float> x, int64_t n, Global<float> y) {
  constexpr int kSize = 16;
  const int lane = lane_index();
  const auto a = dynamic_shared<T>(warp_index() * 2 * kSize * kSize * 2, kSize * kSize);
  const auto b = dynamic_shared<T>((warp_index() * 2 + 1) * kSize * kSize * 2, kSize * kSize);
  for (int i = lane; i < kSize * kSize && n >= 2 * kSize * kSize; i += kWarp) {
    a[i] = static_cast<T>(static_cast<float>(x[i]));
    b[i] = static_cast<T>(static_cast<float>(x[kSize * kSize + i]));
  }
  warp_sync(kFullWarp);
  const int row = lane % 16;
  const int column = lane / 16 * 8;
  Vector<uint32_t, 4> left = load_matrices(a + (row * kSize + column));
  if (kBug == Bug::kFragmentColumn) {
    const uint32_t other = left.element[1];
    left.element[1] = left.element[2];
    left.element[2] = other;
  }
  const Vector<uint32_t, 4> right = kBug == Bug::kFragmentTransposed
                                        ? load_matrices(b + (row * kSize + column))
                                        : load_matrices_transposed(b + (row * kSize + column));
  for (int half = 0; half < 2; ++half) {
    Vector<float, 4> sums = {};
    mma<T>(&sums, left, right.element[2 * half], right.element[2 * half + 1]);
    for (int i = 0; i < 4; ++i) {
      const int to = (lane / 4 + i / 2 * 8) * kSize + half * 8 + lane % 4 * 2 + i % 2;
      if (warp_index() == 0) y[to] = sums.element[i];
    }
  }
}

// Elements in the reverse order of blocks, through global memory.
template <Bug kBug>
WINNOW_KERNEL(kThreads)
meeting_blocks(Global<const float> x, int64_t n, int64_t blocks, Global<float> between,
               Global<uint32_t> counter, Global<float> y) {
  const int64_t i = block_index() * kThreads + thread_index();
  if (i < n) between[i] = x[i];
  if (kBug == Bug::kMissingBlock && block_index() == 1) return;
  blocks_sync(counter, blocks);
  const int64_t from = n - 1 - i;
  if (i < n) y[i] = between[from];
  blocks_sync(counter, blocks);
  if (i < n) between[i] = 0.0f;
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
  if (kernel == 4) {
    const Grid copies = {ceil_div<int64_t>(n, 8 * kThreads), 1,
                         kBug == Bug::kSharedTooSmall ? 1024 : 2048};
    launch("copied", copied<kBug>, copies, kThreads, stream, in, n, out);
  }
  if (kernel == 5) {
    launch("products", products<kBug, c10::BFloat16>, {1, 1, 2048}, kThreads, stream, in, n, out);
  }
  if (kernel == 6) {
    launch("products", products<kBug, c10::Half>, {1, 1, 2048}, kThreads, stream, in, n, out);
  }
  if (kernel == 3) {
    launch("copy_vectors", copy_vectors, grid, kThreads, stream, in, n, out);
  }
  if (kernel == 10) {
    launch("through_memory", through_memory<kBug>, grid, kThreads, stream, in, n, out);
  }
  if (kernel == 11) {
    torch::stable::zero_(const_cast<Tensor&>(y));
    launch("add_up", add_up<kBug>, grid, kThreads, stream, in, n, out);
  }
  if (kernel == 12) {
    launch("signs", signs<kBug>, grid, kThreads, stream, in, n, global<uint8_t>(y));
  }
  if (kernel == 7) {  // more blocks than a launch has
    launch("copy_vectors", copy_vectors, {int64_t{1} << 31}, kThreads, stream, in, n, out);
  }
  if (kernel == 9) {
    const Tensor between = empty(shape(x), ScalarType::Float, x);
    const Tensor counter = empty({1}, ScalarType::Int, x);
    const auto start = [&](const auto& launcher) {
      launcher("meeting_blocks", meeting_blocks<kBug>, grid, kThreads, stream, in, n, grid.x,
               global<float>(between), zeroed<uint32_t>("meeting_blocks", counter, stream), out);
    };
    if (kBug == Bug::kNotTogether) {
      start([](const auto&... arguments) { launch(arguments...); });
    } else {
      start([](const auto&... arguments) { launch_together(arguments...); });
    }
  }
  if (kernel == 8) {
    launch("copy_vectors", copy_vectors, {1, 65536}, kThreads, stream, in, n, out);
  }
}

template <int64_t kFirst, int64_t kLast>
void pick(int64_t bug, int64_t kernel, const Tensor& x, const Tensor& y) {
  if (bug == kFirst) return run<static_cast<Bug>(kFirst)>(kernel, x, y);
  if constexpr (kFirst < kLast) return pick<kFirst + 1, kLast>(bug, kernel, x, y);
}

Tensor planted(const Tensor& x, int64_t kernel, int64_t bug) {
  Tensor y = empty(shape(x), ScalarType::Float, x);
  if (kernel == 13) global<float>(y);  // without a Stream
  pick<0, static_cast<int64_t>(kLastBug)>(bug, kernel, x, y);
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
