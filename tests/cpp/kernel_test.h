#pragma once

#include <gtest/gtest.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "launch.cuh"

#ifdef __CUDACC__
#include "on_device/device_memory.h"
#endif

// What the tests of the CUDA kernels share. The kernels run on the host, under emu/, with AddressSanitizer
// and UndefinedBehaviorSanitizer. A test has three parts: buffers of exactly the size that the kernel may
// touch, launches inside in_every_world, and a comparison with a plain loop.
namespace torchqat::cuda::testing {

// The dtypes of the operators, for TYPED_TEST_SUITE; `make faults` takes fewer. Half and BFloat16 are torch's
// own, from its header-only part.
#ifndef TORCHQAT_STORAGE_TYPES
#define TORCHQAT_STORAGE_TYPES double, float, c10::BFloat16, c10::Half
#endif
using StorageTypes = ::testing::Types<TORCHQAT_STORAGE_TYPES>;

template <typename T>
using opmath_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Around a pack of 8, a warp, a block, and a block of packs.
inline const std::vector<int64_t> kSizes = {1, 7, 8, 9, 31, 32, 33, 255, 256, 257, 2047, 2048, 2049, 5003};

// A kernel was started; EXPECT_EQ would not say why not.
inline void expect_success(cudaError_t error) { EXPECT_STREQ(cudaGetErrorString(error), "no error"); }

#ifndef __CUDACC__
// Device memory of exactly n elements that begins `shift` elements after a 32-byte boundary. It holds what
// the world's poison makes of it until somebody writes; reads past its end are AddressSanitizer's to find,
// writes before its beginning `contents` finds.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n, int64_t shift = 0)
      : n_(n),
        shift_(shift),
        poison_(emu::world.poison),
        bytes_(new (kAlign) uint8_t[(n + shift) * sizeof(T)]) {
    std::memset(bytes_.get(), poison_, (n + shift) * sizeof(T));
  }
  Buffer(const std::vector<T>& values, int64_t shift = 0)
      : Buffer(static_cast<int64_t>(values.size()), shift) {
    assign(values);
  }

  T* data() { return reinterpret_cast<T*>(bytes_.get()) + shift_; }
  int64_t size() const { return n_; }

  void assign(const std::vector<T>& values) { std::copy(values.begin(), values.end(), data()); }
  std::vector<T> contents() {
    const auto is_poison = [&](uint8_t byte) { return byte == poison_; };
    EXPECT_TRUE(std::all_of(bytes_.get(), bytes_.get() + shift_ * sizeof(T), is_poison))
        << "something was written before the buffer";
    return std::vector<T>(data(), data() + n_);
  }

 private:
  static constexpr std::align_val_t kAlign{32};
  struct Free {
    void operator()(uint8_t* bytes) const { operator delete[](bytes, kAlign); }
  };
  int64_t n_, shift_;
  uint8_t poison_;
  std::unique_ptr<uint8_t[], Free> bytes_;
};
#endif

// Equal to the last bit, NaN and the sign of zero included.
template <typename T>
bool same_bits(const T& a, const T& b) {
  static_assert(std::is_trivially_copyable_v<T>);
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}
template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}
template <typename... T>
bool same_bits(const std::tuple<T...>& a, const std::tuple<T...>& b) {
  const auto each = [&]<size_t... I>(std::index_sequence<I...>) {
    return (same_bits(std::get<I>(a), std::get<I>(b)) && ...);
  };
  return each(std::index_sequence_for<T...>{});
}

// Worlds in which a correct kernel gives the same bits. They differ in what nobody wrote (NaN, large numbers,
// 0) and in the order of threads and blocks.
inline std::vector<emu::World> worlds() {
  const unsigned seed = emu::first_seed();
  return {{0xFF, emu::Order::ascending},
          {0x5B, emu::Order::descending},
          {0x00, emu::Order::shuffled, seed},
          {0xA4, emu::Order::shuffled, seed + 1}};
}

class InWorld {
 public:
  explicit InWorld(const emu::World& world) : before_(emu::world) { emu::world = world; }
  ~InWorld() { emu::world = before_; }

 private:
  emu::World before_;
};

// Calls run(), which makes its buffers, launches and returns what came out (a vector, or a std::tuple of
// them), in every world; a difference fails the test. Returns the first result.
template <typename Run>
auto in_every_world(Run run) {
  const auto run_in = [&](const emu::World& world) {
    const InWorld inside(world);
    const ::testing::ScopedTrace trace(__FILE__, __LINE__, "with " + emu::name_of(world));
    return run();
  };
  const auto all = worlds();
  const auto first = run_in(all[0]);
  std::string different;
  for (size_t i = 1; i < all.size(); ++i) {
    if (!same_bits(first, run_in(all[i]))) different += "\n  with " + emu::name_of(all[i]);
  }
  EXPECT_TRUE(different.empty()) << "the result depends on memory that nobody wrote, or on the order of "
                                    "threads or blocks: another than with "
                                 << emu::name_of(all[0]) << different;
  return first;
}

}  // namespace torchqat::cuda::testing
