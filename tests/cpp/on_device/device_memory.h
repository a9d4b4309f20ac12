#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

// Takes the place of the emulator where nvcc compiles the tests of the kernels: the same bodies, on a GPU.
// The worlds differ only in what nobody wrote to global memory; the order of threads is the device's.
namespace emu {

enum class Order { ascending, descending, shuffled };

struct World {
  uint8_t poison = 0xFF;
  Order order = Order::ascending;
  unsigned seed = 1;
};
inline World world;

inline std::string name_of(const World& world) { return "poison " + std::to_string(world.poison); }
inline unsigned first_seed() { return 1; }

}  // namespace emu

namespace torchqat::cuda::testing {

// What a kernel did wrong shows at the next call; the exception fails the test.
inline void check_device(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

struct FreeOnDevice {
  void operator()(void* memory) const { cudaFree(memory); }
};
template <typename T>
using DeviceArray = std::unique_ptr<T[], FreeOnDevice>;

template <typename T>
DeviceArray<T> allocate_on_device(int64_t n) {
  void* memory = nullptr;
  check_device(cudaMalloc(&memory, std::max<int64_t>(n, 1) * sizeof(T)));
  return DeviceArray<T>(static_cast<T*>(memory));
}

// As the emulator's, in the device's memory; only kernels may use data(). Reads and writes past its end are
// compute-sanitizer's to find.
template <typename T>
class Buffer {
 public:
  static_assert(std::is_trivially_copyable_v<T>);

  explicit Buffer(int64_t n, int64_t shift = 0)
      : n_(n), shift_(shift), poison_(emu::world.poison), memory_(allocate_on_device<T>(n + shift)) {
    check_device(cudaMemset(memory_.get(), poison_, (n + shift) * sizeof(T)));
  }
  Buffer(const std::vector<T>& values, int64_t shift = 0)
      : Buffer(static_cast<int64_t>(values.size()), shift) {
    assign(values);
  }

  T* data() { return memory_.get() + shift_; }
  int64_t size() const { return n_; }

  void assign(const std::vector<T>& values) {
    check_device(cudaMemcpy(data(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> contents() {
    std::vector<uint8_t> before(shift_ * sizeof(T));
    check_device(cudaMemcpy(before.data(), memory_.get(), before.size(), cudaMemcpyDeviceToHost));
    EXPECT_TRUE(std::all_of(before.begin(), before.end(), [&](uint8_t byte) { return byte == poison_; }))
        << "something was written before the buffer";
    std::vector<T> values(n_);
    check_device(cudaMemcpy(values.data(), data(), n_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  int64_t n_, shift_;
  uint8_t poison_;
  DeviceArray<T> memory_;
};

// Memory for n elements of which few are touched.
template <typename T>
class FarBuffer {
 public:
  explicit FarBuffer(int64_t n) : memory_(allocate_on_device<T>(n)) {}

  T* data() { return memory_.get(); }

  T at(int64_t i) {
    T value;
    check_device(cudaMemcpy(&value, data() + i, sizeof(T), cudaMemcpyDeviceToHost));
    return value;
  }
  void set(int64_t i, T value) {
    check_device(cudaMemcpy(data() + i, &value, sizeof(T), cudaMemcpyHostToDevice));
  }

 private:
  DeviceArray<T> memory_;
};

}  // namespace torchqat::cuda::testing
