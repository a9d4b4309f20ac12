#pragma once

#include <cuda_runtime.h>

#include <cstring>

namespace cub {

// Stands in for CUB's BlockReduce with its default algorithm, for one-dimensional blocks, and adds in the
// same order: a tree in each warp, then the warps one after the other. The result is thread 0's alone: the
// other threads get a value that changes from world to world.
template <typename T, int kBlockDim>
class BlockReduce {
 public:
  struct TempStorage {
    alignas(T) unsigned char values[kBlockDim * sizeof(T)];
  };

  explicit BlockReduce(TempStorage& storage) : values_(reinterpret_cast<T*>(storage.values)) {}

  T Sum(T input, emu::Site site = emu::Site::current()) {
    return Reduce(
        input, [](const T& a, const T& b) { return a + b; }, site);
  }

  template <typename Op>
  T Reduce(T input, Op op, emu::Site site = emu::Site::current()) {
    if (emu::block_size() != kBlockDim || blockDim.x != kBlockDim)
      emu::fail("BlockReduce of another block size", site);
    std::memcpy(&values_[threadIdx.x], &input, sizeof(T));
    __syncthreads(site);
    T result;
    std::memset(static_cast<void*>(&result), emu::world.poison, sizeof(T));
    if (threadIdx.x == 0) {
      for (int warp = 0; warp < kBlockDim; warp += 32) {
        const T of_warp = reduce_warp(warp, op);
        result = warp == 0 ? of_warp : op(result, of_warp);
      }
    }
    return result;
  }

 private:
  // Lane i takes on lane i + offset, for offsets 1, 2, 4, ..; the lanes that end in lane 0 are the multiples.
  template <typename Op>
  T reduce_warp(int first, Op op) {
    for (int offset = 1; offset < 32; offset *= 2) {
      for (int lane = 0; lane + offset < 32 && first + lane + offset < kBlockDim; lane += 2 * offset) {
        values_[first + lane] = op(values_[first + lane], values_[first + lane + offset]);
      }
    }
    return values_[first];
  }

  T* values_;
};

}  // namespace cub
