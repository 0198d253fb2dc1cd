// The names of csrc/common/device.h on the emulator.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <tuple>

#include "block.h"
#include "checked_pointer.h"

#define WINNOW_KERNEL(threads) void
#define WINNOW_DEVICE inline
#define WINNOW_CALLED inline
// The macro's own line names the array: one address for all threads, another per instantiation.
#define WINNOW_SHARED(T, name, count) \
  static const char name##_site = 0;  \
  const ::winnow::Shared<T> name = ::winnow::host::shared_array<T>(&name##_site, count)
// The same schemas in a namespace of their own: these operators take CPU tensors.
#define WINNOW_DEVICE_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(winnow_on_host, CPU, m)

namespace winnow {

template <typename T>
using Global = host::Pointer<T, false>;
template <typename T>
using Shared = host::Pointer<T, true>;

namespace host {

template <typename T>
Shared<T> shared_array(const void* site, size_t count) {
  char* begin = Block::current().shared().array(site, count * sizeof(T));
  return {reinterpret_cast<T*>(begin), {begin, begin + count * sizeof(T)}};
}

inline float as_float(uint16_t bits, c10::BFloat16) {
  return static_cast<float>(c10::BFloat16(bits, c10::BFloat16::from_bits()));
}
inline float as_float(uint16_t bits, c10::Half) {
  return static_cast<float>(c10::Half(bits, c10::Half::from_bits()));
}

// Where the caller of an operation stands.
#define WINNOW_SITE ::winnow::host::Site site = {__builtin_FILE(), __builtin_LINE()}

// Everyone in the mask brings a value and reads the one of lane pick(lane).
template <typename T, typename Pick>
T exchange(uint32_t mask, const T& value, const Pick& pick, Site site) {
  static_assert(sizeof(T) <= kMaxExchange && std::is_trivially_copyable_v<T>);
  Block& block = Block::current();
  Meeting& meeting = block.meet(mask, &value, sizeof(T), site, false);
  const int source = pick(block.thread() % kLanes);
  if ((mask >> source & 1) == 0) {
    block.fault("shuffle at " + std::string(site.file) + ":" + std::to_string(site.line) +
                ": reads lane " + std::to_string(source) + ", which the mask leaves out");
  }
  T result;
  std::memcpy(&result, meeting.values[source], sizeof(T));
  block.leave(meeting);
  return result;
}

}  // namespace host

inline int thread_index() {
  return host::Block::current().thread();
}
inline int64_t block_index() {
  return host::Block::current().index_x();
}
inline int64_t block_index_y() {
  return host::Block::current().index_y();
}
inline int lane_index() {
  return thread_index() % kWarp;
}
inline int warp_index() {
  return thread_index() / kWarp;
}

inline void block_sync(WINNOW_SITE) {
  host::Block::current().barrier(site);
}
inline void blocks_sync(Global<uint32_t> counter, int64_t blocks, WINNOW_SITE) {
  host::Block::current().barrier_of_blocks(counter.counter(), blocks, site);
}
inline bool block_any(bool flag, WINNOW_SITE) {
  return host::Block::current().barrier(site, flag);
}
inline void warp_sync(uint32_t mask, WINNOW_SITE) {
  host::Block& block = host::Block::current();
  block.leave(block.meet(mask, "", 0, site, true));
}
inline uint32_t ballot(uint32_t mask, bool flag, WINNOW_SITE) {
  host::Block& block = host::Block::current();
  host::Meeting& meeting = block.meet(mask, &flag, sizeof(flag), site, false);
  uint32_t votes = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) != 0 && meeting.values[lane][0] != 0) votes |= 1u << lane;
  }
  block.leave(meeting);
  return votes;
}
template <typename T>
T shuffle(uint32_t mask, T value, int lane, WINNOW_SITE) {
  return host::exchange(mask, value, [&](int) { return lane % kWarp; }, site);
}
template <typename T>
T shuffle_xor(uint32_t mask, T value, int offset, WINNOW_SITE) {
  return host::exchange(mask, value, [&](int own) { return (own ^ offset) % kWarp; }, site);
}
template <typename T>
T shuffle_up(uint32_t mask, T value, int offset, WINNOW_SITE) {
  return host::exchange(
      mask, value, [&](int own) { return own < offset ? own : own - offset; }, site);
}

template <typename T, bool kShared, typename Value>
T atomic_add(host::Pointer<T, kShared> pointer, Value value) {
  return pointer.fetch_add(static_cast<T>(value));
}

template <bool kShared>
uint32_t atomic_or(host::Pointer<uint32_t, kShared> pointer, uint32_t bits) {
  return pointer.fetch_or(bits);
}

template <int N, typename T, bool kShared>
Vector<std::remove_const_t<T>, N> load_vector(host::Pointer<T, kShared> pointer) {
  static_assert(N * sizeof(T) <= 16);
  return pointer.template load_as<Vector<std::remove_const_t<T>, N>>();
}
template <int N, typename T, bool kShared>
void store_vector(host::Pointer<T, kShared> pointer, const Vector<T, N>& vector) {
  static_assert(N * sizeof(T) <= 16);
  pointer.store(vector);
}

template <typename T>
Shared<T> dynamic_shared(int64_t offset, int64_t count) {
  host::Block& block = host::Block::current();
  const size_t end = static_cast<size_t>(offset) + static_cast<size_t>(count) * sizeof(T);
  char* memory = block.shared().dynamic(end);
  if (memory == nullptr) block.fault("uses more dynamic shared memory than its launch names");
  return {reinterpret_cast<T*>(memory + offset), {memory + offset, memory + end}};
}

template <typename T>
void copy_async(Shared<T> target, host::Pointer<const T, false> source, bool valid) {
  host::Block& block = host::Block::current();
  struct alignas(16) Bytes {
    char byte[16];
  } bytes = {};
  if (valid) bytes = source.template load_as<Bytes>();
  block.shared().begin_copy(target.writable(sizeof(bytes)), &bytes, block.thread());
}
inline void copy_commit() {
  host::Block& block = host::Block::current();
  block.shared().commit_copies(block.thread());
}
template <int N>
void copy_wait() {
  host::Block& block = host::Block::current();
  block.shared().wait_copies(block.thread(), N);
}

namespace host {

// Each lane reads its row of 16 bytes and receives its part of the four matrices.
template <bool kTransposed, typename T>
Vector<uint32_t, 4> spread_matrices(Shared<T> row, Site site) {
  static_assert(sizeof(T) == 2);
  struct alignas(16) Row {
    uint16_t element[8];
  };
  Block& block = Block::current();
  const Row own = row.template load_as<Row>();
  Meeting& meeting = block.meet(kFullWarp, &own, sizeof(own), site, false);
  const int lane = block.thread() % kLanes;
  Vector<uint32_t, 4> result;
  for (int m = 0; m < 4; ++m) {
    uint32_t word = 0;
    for (int i = 0; i < 2; ++i) {
      const int r = kTransposed ? 2 * (lane % 4) + i : lane / 4;
      const int c = kTransposed ? lane / 4 : 2 * (lane % 4) + i;
      uint16_t element;
      std::memcpy(&element, meeting.values[8 * m + r] + c * sizeof(element), sizeof(element));
      word |= static_cast<uint32_t>(element) << (16 * i);
    }
    result.element[m] = word;
  }
  block.leave(meeting);
  return result;
}

}  // namespace host

template <typename T>
Vector<uint32_t, 4> load_matrices(host::Pointer<T, true> row, WINNOW_SITE) {
  return host::spread_matrices<false>(row, site);
}
template <typename T>
Vector<uint32_t, 4> load_matrices_transposed(host::Pointer<T, true> row, WINNOW_SITE) {
  return host::spread_matrices<true>(row, site);
}

template <typename T>
uint32_t pack_pair(float low, float high) {
  return static_cast<uint32_t>(T(low).x) | static_cast<uint32_t>(T(high).x) << 16;
}

template <typename T>
void mma(Vector<float, 4>* sums, const Vector<uint32_t, 4>& a, uint32_t b0, uint32_t b1,
         WINNOW_SITE) {
  const uint32_t own[6] = {a.element[0], a.element[1], a.element[2], a.element[3], b0, b1};
  host::Block& block = host::Block::current();
  host::Meeting& meeting = block.meet(kFullWarp, own, sizeof(own), site, false);
  const auto element = [&](int lane, int word, int half) {
    uint16_t bits;
    std::memcpy(&bits, meeting.values[lane] + word * 4 + half * 2, sizeof(bits));
    return host::as_float(bits, T{});
  };
  const int lane = block.thread() % kWarp;
  for (int k = 0; k < 16; ++k) {
    const int quad = k % 8 / 2;
    for (int i = 0; i < 4; ++i) {
      const float left = element(lane / 4 * 4 + quad, k / 8 * 2 + i / 2, k % 2);
      const float right = element((2 * (lane % 4) + i % 2) * 4 + quad, 4 + k / 8, k % 2);
      sums->element[i] = std::fma(left, right, sums->element[i]);
    }
  }
  block.leave(meeting);
}

inline float fast_exp2(float x) {
  return std::exp2(x);
}

// ---- launchers ----

inline void check_device(const char* argument, const Tensor& tensor) {
  check_defined(argument, tensor);
  WINNOW_CHECK(tensor.is_cpu(), argument, ": the emulator takes CPU tensors");
}

class Stream {
 public:
  explicit Stream(const Tensor&) { ++alive; }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { --alive; }

  static inline thread_local int alive = 0;
};

template <typename T>
Global<T> global(const Tensor& tensor) {
  WINNOW_CHECK(Stream::alive > 0, "a pointer to a tensor of shape ", shape_of(tensor),
               " is taken before there is a Stream, which knows the device it has to be on");
  auto* begin = static_cast<char*>(tensor.data_ptr());
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); ++d) last += (tensor.size(d) - 1) * tensor.stride(d);
  const int64_t elements = tensor.numel() == 0 ? 0 : last + 1;
  return {reinterpret_cast<T*>(begin),
          {begin, begin + elements * static_cast<int64_t>(tensor.element_size())}};
}

struct Seed {
  Global<const int64_t> on_device;
  uint64_t get() const { return static_cast<uint64_t>(*on_device); }
};

inline Seed seed_of(const Tensor& seed) {
  check_dtype("seed", seed, ScalarType::Long);
  check_dim("seed", seed, 0, "one number");
  return {global<const int64_t>(seed)};
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, int threads, const Stream&,
            const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
  check_grid(name, grid);
  const std::tuple<Parameters...> bound(static_cast<Parameters>(arguments)...);
  host::Block::current().run(name, grid.x, grid.y, grid.shared_bytes, threads,
                             [&] { std::apply(kernel, bound); });
}

// Few, so that a block has more than one share of a problem.
template <typename... Parameters>
int64_t blocks_at_once(const char*, void (*)(Parameters...), int) {
  return host::kBlocksAtOnce;
}

template <typename T>
Global<T> zeroed(const char*, const Tensor& tensor, const Stream&) {
  const auto bytes = static_cast<size_t>(tensor.numel()) * tensor.element_size();
  std::memset(tensor.data_ptr(), 0, bytes);
  return global<T>(tensor);
}

template <typename... Parameters, typename... Arguments>
void launch_together(const char* name, void (*kernel)(Parameters...), Grid grid, int threads,
                     const Stream&, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
  check_grid(name, grid);
  const std::tuple<Parameters...> bound(static_cast<Parameters>(arguments)...);
  host::Block::current().run_together(name, grid.x, grid.y, threads,
                                      [&] { std::apply(kernel, bound); });
}

}  // namespace winnow
