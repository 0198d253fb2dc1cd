// What a kernel may use, under names that have two meanings: nvcc maps them to the GPU
// (device_cuda.h), and tests/native compiles the same .cu files as C++ and runs every thread of a
// block as a fiber (tests/native/emulator/device_host.h), with each access to memory checked. A
// kernel therefore uses these names only, never threadIdx, __shared__ or <<<>>>.
//
//   WINNOW_KERNEL(threads), WINNOW_DEVICE     qualifiers; blocks are one-dimensional
//   WINNOW_CALLED                             a device function that is called, not inlined, since
//                                             it is large, and used in many places
//   thread_index() block_index() block_index_y() lane_index() warp_index()
//   Global<T>, Shared<T>                      pointers; plain ones under nvcc. Read an element into
//                                             a typed variable (never `auto x = p[i]`)
//   WINNOW_SHARED(T, name, count)             an array that the block shares, uninitialised
//   dynamic_shared<T>(offset, count)          a piece, from a byte offset on, of Grid::shared_bytes
//   block_sync() warp_sync(mask)
//   block_any(flag)                           a barrier that says whether any thread's flag is set
//   blocks_sync(counter, blocks)              a barrier of that many blocks of launch_together
//                                             that name the same counter: a uint32_t, 0 at launch
//   shuffle(mask, value, lane) shuffle_xor(mask, value, offset) shuffle_up(mask, value, offset)
//   ballot(mask, flag)
//   atomic_add(pointer, value) atomic_or(pointer, bits)
//   load_vector<N>(pointer) store_vector(pointer, vector)   1 to 16 bytes, aligned, one instruction
//   fast_exp2(x)                              2 ulp on the GPU
//
// Asynchronous copies of 16 bytes from global to shared memory. Data is there for the copying
// thread after copy_wait, and for the others after a barrier behind that.
//   copy_async(target, source, valid)         zeros, with nothing read, where not valid
//   copy_commit()                             what was issued since the last commit is one group
//   copy_wait<N>()                            all groups but the N latest have arrived
//
// Matrices of 8 by 8 two-byte elements, spread over a warp: lane i holds row i / 4, columns
// 2 * (i % 4) and one more, in one word. Each lane names one row of 16 bytes of shared memory;
// lanes 8m to 8m + 7 name matrix m.
//   load_matrices(row)                        four of them
//   load_matrices_transposed(row)             four, where lane i holds what lies in column i / 4
//   pack_pair<T>(low, high)                   two numbers as such a word
//   mma<T>(&sums, a, b0, b1)                  sums (16 x 8) += a (16 x 16) * b (16 x 8)
// T is bf16 or fp16. a: the matrices of rows 0-7 and 8-15 of columns 0-7, then of columns 8-15. b:
// rows 0-7, rows 8-15, transposed. sums: row i / 4, columns 2 * (i % 4) and one more, then the
// same columns of row i / 4 + 8.
//
// For launchers:
//   launch(name, kernel, Grid{x, y}, threads, stream, arguments...)
//   launch_together(...)                      the same, all blocks being on the GPU at once, which
//                                             has room for blocks_at_once(name, kernel, threads)
//   zeroed<T>(name, tensor, stream)           global<T>, after zeros have been written
//   Stream stream(tensor)                     the current stream of the tensor's device, made
//                                             current; every operator has one before its pointers
//   global<T>(tensor)                         the memory that its sizes and strides span
//   check_device(argument, tensor)
//   WINNOW_DEVICE_OPERATORS(m) { m.impl(...); }
#pragma once

#include <cstdint>
#include <limits>

#include "common/checks.h"
#include "common/tensors.h"

namespace winnow {

constexpr uint32_t kFullWarp = 0xffffffffu;
constexpr int kWarp = 32;

// N elements that move with one instruction.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T element[N];
};

// Blocks of a launch. y is for a few parts of one problem, x for the problems. Beyond 48 KiB only
// dynamic shared memory goes.
struct Grid {
  int64_t x = 1;
  int64_t y = 1;
  int64_t shared_bytes = 0;
};

// What a GPU launches. It would take the number of blocks modulo 2^32.
inline void check_grid(const char* name, const Grid& grid) {
  WINNOW_CHECK(grid.x < (int64_t{1} << 31) && grid.y < (int64_t{1} << 16), name,
               ": expected a problem of fewer than 2^31 by 65536 thread blocks, got ", grid.x,
               " by ", grid.y);
}

}  // namespace winnow

#ifdef __CUDACC__
#include "common/device_cuda.h"
#else
#include "device_host.h"
#endif

namespace winnow {

template <typename Integer>
constexpr Integer ceil_div(Integer a, Integer b) {
  return (a + b - 1) / b;
}

// Butterflies: every lane gets the same bits, because `combine` is commutative.
template <typename T, typename Combine>
WINNOW_DEVICE T warp_reduce(T value, const Combine& combine) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = combine(value, shuffle_xor(kFullWarp, value, offset));
  }
  return value;
}

// For every thread of a block of kThreads, in one fixed order. `scratch` holds kThreads / 32 values
// and is free again when the call returns.
template <int kThreads, typename T, typename Combine>
WINNOW_DEVICE T block_reduce(T value, Shared<T> scratch, const Combine& combine) {
  static_assert(kThreads % kWarp == 0 && kThreads <= 1024);
  value = warp_reduce(value, combine);
  if constexpr (kThreads > kWarp) {
    if (lane_index() == 0) scratch[warp_index()] = value;
    block_sync();
    value = scratch[0];
    for (int w = 1; w < kThreads / kWarp; ++w) {
      const T other = scratch[w];
      value = combine(value, other);
    }
    block_sync();
  }
  return value;
}

// Exclusive sums over the threads of a block, in thread order; `total` is everyone's. `scratch` as
// in block_reduce.
template <int kThreads, typename T>
WINNOW_DEVICE T block_scan(T value, Shared<T> scratch, T* total) {
  T inclusive = value;
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const T before = shuffle_up(kFullWarp, inclusive, offset);
    if (lane_index() >= offset) inclusive += before;
  }
  if (lane_index() == kWarp - 1) scratch[warp_index()] = inclusive;
  block_sync();
  T start = T(0);
  T sum = T(0);
  for (int w = 0; w < kThreads / kWarp; ++w) {
    if (w == warp_index()) start = sum;
    const T other = scratch[w];
    sum += other;
  }
  block_sync();
  *total = sum;
  // What the lanes before this one have: subtracting would round.
  const T before = shuffle_up(kFullWarp, inclusive, 1);
  return lane_index() == 0 ? start : start + before;
}

// The dtypes of floating inputs. fn receives T{}.
template <typename Fn>
void dispatch_floating(const Tensor& tensor, const Fn& fn) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return fn(float{});
    case ScalarType::BFloat16:
      return fn(c10::BFloat16{});
    case ScalarType::Half:
      return fn(c10::Half{});
    case ScalarType::Double:
      return fn(double{});
    default:
      fail("expected a floating dtype, got ", name_of(tensor.scalar_type()));
  }
}

}  // namespace winnow
