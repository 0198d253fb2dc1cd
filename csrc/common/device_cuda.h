// The names of device.h on a GPU.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <stdexcept>
#include <string>

#define WINNOW_KERNEL(threads) __global__ void __launch_bounds__(threads)
#define WINNOW_DEVICE __device__ __forceinline__
// `inline`: the host's side of it, a call of exit(), is left out where nothing names it.
#define WINNOW_CALLED inline __device__ __noinline__
#define WINNOW_SHARED(T, name, count) __shared__ T name[count]
#define WINNOW_DEVICE_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(winnow, CUDA, m)

// libtorch_cuda's; torch's headers hide the declaration from a build against a CPU torch.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace winnow {

template <typename T>
using Global = T*;
template <typename T>
using Shared = T*;

WINNOW_DEVICE int thread_index() {
  return static_cast<int>(threadIdx.x);
}
WINNOW_DEVICE int64_t block_index() {
  return blockIdx.x;
}
WINNOW_DEVICE int64_t block_index_y() {
  return blockIdx.y;
}
WINNOW_DEVICE int lane_index() {
  return static_cast<int>(threadIdx.x) % kWarp;
}
WINNOW_DEVICE int warp_index() {
  return static_cast<int>(threadIdx.x) / kWarp;
}

WINNOW_DEVICE void block_sync() {
  __syncthreads();
}
// Monotone, so that a block that is late still sees that its meeting is over.
WINNOW_DEVICE void blocks_sync(uint32_t* counter, int64_t blocks) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const auto members = static_cast<uint32_t>(blocks);
    __threadfence();
    const uint32_t goal = (atomicAdd(counter, 1u) / members + 1) * members;
    while (*static_cast<volatile uint32_t*>(counter) < goal) __nanosleep(20);
    __threadfence();
  }
  __syncthreads();
}
WINNOW_DEVICE bool block_any(bool flag) {
  return __syncthreads_or(flag) != 0;
}
WINNOW_DEVICE void warp_sync(uint32_t mask) {
  __syncwarp(mask);
}
WINNOW_DEVICE uint32_t ballot(uint32_t mask, bool flag) {
  return __ballot_sync(mask, flag);
}

// Any type of whole words: the hardware shuffles 32 bits at a time.
template <typename T, typename ShuffleWord>
WINNOW_DEVICE T shuffle_words(T value, const ShuffleWord& shuffle_word) {
  static_assert(sizeof(T) % 4 == 0 && std::is_trivially_copyable_v<T>);
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (size_t i = 0; i < sizeof(T) / 4; ++i) words[i] = shuffle_word(words[i]);
  memcpy(&value, words, sizeof(T));
  return value;
}
template <typename T>
WINNOW_DEVICE T shuffle(uint32_t mask, T value, int lane) {
  return shuffle_words(value, [&](uint32_t word) { return __shfl_sync(mask, word, lane); });
}
template <typename T>
WINNOW_DEVICE T shuffle_xor(uint32_t mask, T value, int offset) {
  return shuffle_words(value, [&](uint32_t word) { return __shfl_xor_sync(mask, word, offset); });
}
// Lanes below `offset` keep their own value.
template <typename T>
WINNOW_DEVICE T shuffle_up(uint32_t mask, T value, int offset) {
  return shuffle_words(value, [&](uint32_t word) { return __shfl_up_sync(mask, word, offset); });
}

template <typename T>
WINNOW_DEVICE T atomic_add(T* pointer, T value) {
  return atomicAdd(pointer, value);
}
WINNOW_DEVICE uint64_t atomic_add(uint64_t* pointer, uint64_t value) {
  return atomicAdd(reinterpret_cast<unsigned long long*>(pointer), value);
}

WINNOW_DEVICE uint32_t atomic_or(uint32_t* pointer, uint32_t bits) {
  return atomicOr(pointer, bits);
}

template <int kBytes>
struct Word;
template <>
struct Word<1> {
  using type = uint8_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <int N, typename T>
WINNOW_DEVICE Vector<std::remove_const_t<T>, N> load_vector(T* pointer) {
  using W = typename Word<N * sizeof(T)>::type;
  const W word = *reinterpret_cast<const W*>(pointer);
  Vector<std::remove_const_t<T>, N> vector;
  memcpy(&vector, &word, sizeof(word));
  return vector;
}
template <int N, typename T>
WINNOW_DEVICE void store_vector(T* pointer, const Vector<T, N>& vector) {
  using W = typename Word<N * sizeof(T)>::type;
  W word;
  memcpy(&word, &vector, sizeof(word));
  *reinterpret_cast<W*>(pointer) = word;
}

extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
template <typename T>
WINNOW_DEVICE T* dynamic_shared(int64_t offset, int64_t) {
  return reinterpret_cast<T*>(dynamic_shared_memory + offset);
}

template <typename T>
WINNOW_DEVICE void copy_async(T* target, const T* source, bool valid) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}
WINNOW_DEVICE void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N>
WINNOW_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

template <typename T>
WINNOW_DEVICE Vector<uint32_t, 4> load_matrices(T* row) {
  static_assert(sizeof(T) == 2);
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  Vector<uint32_t, 4> m;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m.element[0]), "=r"(m.element[1]), "=r"(m.element[2]), "=r"(m.element[3])
               : "r"(address)
               : "memory");
  return m;
}
template <typename T>
WINNOW_DEVICE Vector<uint32_t, 4> load_matrices_transposed(T* row) {
  static_assert(sizeof(T) == 2);
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  Vector<uint32_t, 4> m;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m.element[0]), "=r"(m.element[1]), "=r"(m.element[2]), "=r"(m.element[3])
               : "r"(address)
               : "memory");
  return m;
}

template <typename T>
WINNOW_DEVICE uint32_t pack_pair(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T, c10::Half>);
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

template <typename T>
WINNOW_DEVICE void mma(Vector<float, 4>* sums, const Vector<uint32_t, 4>& a, uint32_t b0,
                       uint32_t b1) {
  float* c = sums->element;
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.element[0]), "r"(a.element[1]), "r"(a.element[2]), "r"(a.element[3]), "r"(b0),
          "r"(b1));
  } else {
    static_assert(std::is_same_v<T, c10::Half>);
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.element[0]), "r"(a.element[1]), "r"(a.element[2]), "r"(a.element[3]), "r"(b0),
          "r"(b1));
  }
}

WINNOW_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- launchers ----

inline void check_cuda_call(const char* what, cudaError_t status) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

inline void check_device(const char* argument, const Tensor& tensor) {
  check_defined(argument, tensor);
  WINNOW_CHECK(tensor.is_cuda(), argument,
               ": expected a CUDA tensor like the other arguments, got one on another device");
}

// The device of the operator that runs on this thread, or -1.
inline thread_local int32_t running_device = -1;

// torch's runtime and ours are two copies; both are told, and torch's is restored.
class Stream {
 public:
  explicit Stream(const Tensor& tensor)
      : guard_(tensor.get_device_index()), before_(running_device) {
    const int32_t device = tensor.get_device_index();
    check_cuda_call("cudaSetDevice", cudaSetDevice(device));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    running_device = device;
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { running_device = before_; }
  cudaStream_t get() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  int32_t before_;
  cudaStream_t stream_ = nullptr;
};

// A kernel that follows a pointer into another device's memory takes the whole context down.
template <typename T>
T* global(const Tensor& tensor) {
  const int32_t device = tensor.get_device_index();
  WINNOW_CHECK(running_device < 0 || device == running_device,
               "expected every tensor on cuda:", running_device, ", got one of shape ",
               shape_of(tensor), " on ", device < 0 ? "the CPU" : "cuda:" + std::to_string(device));
  return static_cast<T*>(tensor.data_ptr());
}

struct Seed {
  const int64_t* on_device;
  int64_t value;

  WINNOW_DEVICE uint64_t get() const {
    return static_cast<uint64_t>(on_device ? *on_device : value);
  }
};

inline Seed seed_of(const Tensor& seed) {
  check_dtype("seed", seed, ScalarType::Long);
  check_dim("seed", seed, 0, "one number");
  if (seed.is_cpu()) return {nullptr, *static_cast<const int64_t*>(seed.data_ptr())};
  return {global<const int64_t>(seed), 0};
}

template <typename T>
T* zeroed(const char* name, const Tensor& tensor, const Stream& stream) {
  T* memory = global<T>(tensor);
  const auto bytes = static_cast<size_t>(tensor.numel() * tensor.element_size());
  check_cuda_call(name, cudaMemsetAsync(memory, 0, bytes, stream.get()));
  return memory;
}

template <typename... Parameters>
int64_t blocks_at_once(const char* name, void (*kernel)(Parameters...), int threads) {
  int device = 0;
  int processors = 0;
  int each = 0;
  check_cuda_call(name, cudaGetDevice(&device));
  check_cuda_call(name,
                  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  check_cuda_call(name, cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, 0));
  return int64_t{processors} * each;
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, int threads,
            const Stream& stream, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
  check_grid(name, grid);
  const auto bytes = static_cast<int>(grid.shared_bytes);
  if (bytes > 48 * 1024) {
    check_cuda_call(name, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                               cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  }
  kernel<<<dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y)), threads, bytes,
           stream.get()>>>(static_cast<Parameters>(arguments)...);
  check_cuda_call(name, cudaGetLastError());
}

template <typename... Parameters, typename... Arguments>
void launch_together(const char* name, void (*kernel)(Parameters...), Grid grid, int threads,
                     const Stream& stream, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
  check_grid(name, grid);
  cudaLaunchAttribute together = {};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream.get();
  config.attrs = &together;
  config.numAttrs = 1;
  check_cuda_call(name, cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
}

}  // namespace winnow
