#pragma once

// Stands in for CUDA's header of this name where g++ compiles the kernels. It has what our kernels use and
// nothing else: a new kernel that needs more adds it here, with the checks that a device does not make.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "engine.h"
#include "intrinsics.h"
#include "vector_types.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
// Static in a function, of a size known to the engine, which fills it before each block.
#define __shared__ thread_local

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct EmuStream*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unrecognized error code";
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t count, cudaStream_t) {
  std::memset(to, value, count);
  return cudaSuccess;
}

// The limits are those of compute capability 8.0 and later.
template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  static_assert((std::is_trivially_copyable_v<Params> && ...), "kernel arguments are copied as bytes");
  static_assert((sizeof(Params) + ... + 0) <= 32764, "kernel arguments take at most 32764 bytes");
  const dim3 grid = config->gridDim;
  const dim3 block = config->blockDim;
  const bool grid_fits =
      grid.x >= 1 && grid.x <= 0x7FFFFFFF && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535;
  const bool block_fits = block.x >= 1 && block.y >= 1 && block.z >= 1 && block.z <= 64 &&
                          uint64_t{block.x} * block.y * block.z <= 1024;
  if (!grid_fits || !block_fits) return cudaErrorInvalidConfiguration;
  if (config->dynamicSmemBytes > emu::kDynamicSharedSize) return cudaErrorInvalidValue;
  emu::kernels.insert(reinterpret_cast<const void*>(kernel));
  const std::tuple<Params...> copies(std::forward<Args>(args)...);
  emu::run_grid(grid, block, config->dynamicSmemBytes, [&] { std::apply(kernel, copies); });
  return cudaSuccess;
}
