#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <cub/block/block_reduce.cuh>
#include <type_traits>

#include "torchqat/math/macros.h"

// Loops over a Pack: unrolled, its elements stay in registers. And loops beside them, which would take more
// registers than the packs if they were unrolled as far as nvcc likes.
#ifdef __CUDACC__
#define TORCHQAT_UNROLL _Pragma("unroll")
#define TORCHQAT_UNROLL_TWICE _Pragma("unroll 2")
#else
#define TORCHQAT_UNROLL
#define TORCHQAT_UNROLL_TWICE
#endif

// What all kernels share: the one way to start one, grids that depend on shapes alone, 16-byte memory
// accesses, and sums whose order is fixed, so that a result repeats bit for bit from run to run and from
// device to device.
namespace torchqat::cuda {

// Of every block. With __launch_bounds__(kThreads) alone ptxas takes registers away where that lets one more
// block on an SM, and spills; a kernel that would names, beside it, the blocks that its registers suffice
// for.
constexpr int kThreads = 256;

// Several waves on any device there is, and few enough for one block to add a partial sum of each.
constexpr int64_t kMaxBlocks = 4096;

// Blocks for n elements of which a thread takes `per_thread` at a time. Beyond `most` the kernel must loop.
constexpr unsigned blocks_for(int64_t n, int64_t per_thread = 1, int64_t most = kMaxBlocks) {
  const int64_t per_block = kThreads * per_thread;
  return static_cast<unsigned>(std::clamp((n + per_block - 1) / per_block, int64_t{1}, most));
}

// The one place where a kernel is started. No chevrons: this is plain C++, which the emulator of the tests
// compiles too. Arguments convert to the kernel's parameters as in a call; together they may take 32764
// bytes.
template <typename... Params>
cudaError_t launch(void (*kernel)(Params...), dim3 blocks, cudaStream_t stream,
                   const std::type_identity_t<Params>&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// This thread's number in a one-dimensional grid, and how many there are.
__device__ __forceinline__ int64_t grid_thread() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }
__device__ __forceinline__ int64_t grid_threads() { return int64_t{gridDim.x} * kThreads; }

// N consecutive elements that move between memory and registers 16 bytes at a time (or all at once if fewer).
template <typename T, int N>
struct alignas(std::min<size_t>(16, N * sizeof(T))) Pack {
  T value[N];

  __device__ __forceinline__ T& operator[](int i) { return value[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return value[i]; }
};

template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

// To global memory.
template <typename T, int N>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& pack) {
#ifdef __CUDA_ARCH__
  // As instructions: nvcc splits the assignment below into the elements that were made one by one.
  constexpr size_t kBytes = alignof(Pack<T, N>);
  using Small = std::conditional_t<kBytes == 1, unsigned char, unsigned short>;
  using Large = std::conditional_t<kBytes == 8, uint2, uint4>;
  using Word = std::conditional_t<kBytes == 4, unsigned, std::conditional_t<kBytes <= 2, Small, Large>>;
  Word words[sizeof(pack) / kBytes];
  memcpy(words, &pack, sizeof(pack));
  TORCHQAT_UNROLL
  for (size_t i = 0; i < sizeof(pack) / kBytes; ++i) __stwb(reinterpret_cast<Word*>(to) + i, words[i]);
#else
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
#endif
}

// Whether every one of the pointers may be used with packs of N.
template <int N, typename... T>
TORCHQAT_HD bool pack_aligned(const T*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % alignof(Pack<T, N>) == 0) && ...);
}

// The sum over the block, in thread 0; the others get nothing of use. All threads of the block must come
// here.
template <typename T>
__device__ __forceinline__ T block_sum(T value) {
  using Reduce = cub::BlockReduce<T, kThreads>;
  __shared__ typename Reduce::TempStorage scratch;
  __syncthreads();  // the sum before this one may still be reading
  return Reduce(scratch).Sum(value);
}

// True, in every thread of it, for the last of `blocks` blocks to come here: what all of them wrote before,
// it can read. `ticket` must be 0 at first and is 0 again afterwards. All threads of the block must come
// here.
__device__ __forceinline__ bool is_last_block(unsigned* ticket, unsigned blocks) {
  __shared__ bool last;
  __threadfence();  // what was written before, ahead of the ticket
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(ticket, blocks - 1) == blocks - 1;
  __syncthreads();
  if (last) __threadfence();  // the ticket, ahead of what is read afterwards
  return last;
}

// The sum of slots[0], slots[stride], ..., slots[(count - 1) * stride], in thread 0 and in an order that
// `count` alone fixes. All threads of the block must come here.
template <typename T>
__device__ __forceinline__ T sum_slots(const T* slots, int64_t count, int64_t stride = 1) {
  T sum{};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum = sum + slots[i * stride];
  return block_sum(sum);
}

}  // namespace torchqat::cuda
