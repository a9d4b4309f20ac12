#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>

#include "engine.h"

// The device functions of CUDA that the kernels call. Where lanes or threads act together, the place in the
// source is part of the call: two threads meet only at the same one.

constexpr int warpSize = emu::kWarpSize;

inline void __syncthreads(emu::Site site = emu::Site::current()) { emu::block_barrier(site); }
inline int __syncthreads_count(int predicate, emu::Site site = emu::Site::current()) {
  return static_cast<int>(emu::block_barrier(site, predicate != 0));
}
inline int __syncthreads_and(int predicate, emu::Site site = emu::Site::current()) {
  return emu::block_barrier(site, predicate != 0) == emu::block_size();
}
inline int __syncthreads_or(int predicate, emu::Site site = emu::Site::current()) {
  return emu::block_barrier(site, predicate != 0) != 0;
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFF, emu::Site site = emu::Site::current()) {
  emu::warp_call({emu::WarpCall::Kind::sync, site, mask});
}

// Blocks run one after the other: there is nothing to order.
inline void __threadfence() {}
inline void __threadfence_block() {}

inline unsigned __ballot_sync(unsigned mask, int predicate, emu::Site site = emu::Site::current()) {
  return static_cast<unsigned>(
      emu::warp_call({emu::WarpCall::Kind::ballot, site, mask, predicate != 0 ? 1U : 0U}));
}
inline int __any_sync(unsigned mask, int predicate, emu::Site site = emu::Site::current()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, emu::Site site = emu::Site::current()) {
  return __ballot_sync(mask, predicate, site) == mask;
}

namespace emu {

// `source` out of the caller's segment of `width` lanes: a device gives the caller its own value.
template <typename T>
T shuffle(unsigned mask, T value, int source, bool stays, Site site) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4 && sizeof(T) <= 8, "what a device can shuffle");
  const unsigned own = linear_thread() % kWarpSize;
  WarpCall call{WarpCall::Kind::shuffle, site, mask};
  std::memcpy(&call.value, &value, sizeof(T));
  call.source = stays ? own : static_cast<unsigned>(source);
  const uint64_t bits = warp_call(call);
  T result;
  std::memcpy(&result, &bits, sizeof(T));
  return result;
}

inline int lane() { return static_cast<int>(linear_thread() % kWarpSize); }
inline int segment(int width, const Site& site) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0)
    fail("the width of a shuffle is no power of two", site);
  return lane() / width * width;
}

}  // namespace emu

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, emu::Site site = emu::Site::current()) {
  return emu::shuffle(mask, value, emu::segment(width, site) + (source & (width - 1)), false, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   emu::Site site = emu::Site::current()) {
  const int source = emu::lane() + static_cast<int>(delta);
  return emu::shuffle(mask, value, source, source >= emu::segment(width, site) + width, site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 emu::Site site = emu::Site::current()) {
  const int source = emu::lane() - static_cast<int>(delta);
  return emu::shuffle(mask, value, source, source < emu::segment(width, site), site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, emu::Site site = emu::Site::current()) {
  const int source = emu::lane() ^ bits;
  return emu::shuffle(mask, value, source, source >= emu::segment(width, site) + width, site);
}

// Atomics on integers alone: their result does not depend on the order. There are none on floating point.
namespace emu {
template <typename T>
concept AtomicInteger =
    std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;
}

template <emu::AtomicInteger T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address =
      static_cast<T>(static_cast<std::make_unsigned_t<T>>(old) + static_cast<std::make_unsigned_t<T>>(value));
  return old;
}
template <emu::AtomicInteger T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = old < value ? value : old;
  return old;
}
template <emu::AtomicInteger T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = value < old ? value : old;
  return old;
}
template <emu::AtomicInteger T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = old | value;
  return old;
}
template <emu::AtomicInteger T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = old & value;
  return old;
}
template <emu::AtomicInteger T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  const T old = *address;
  *address = value;
  return old;
}
template <emu::AtomicInteger T>
T atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  const T old = *address;
  if (old == compare) *address = value;
  return old;
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  const unsigned old = *address;
  *address = old >= limit ? 0 : old + 1;
  return old;
}

// Loads and stores with a hint to the caches.
template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
void __stcs(T* address, T value) {
  *address = value;
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline int __ffsll(long long x) {
  return x == 0 ? 0 : std::countr_zero(static_cast<unsigned long long>(x)) + 1;
}
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1U) << (31 - i);
  return reversed;
}

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

// Arithmetic that nvcc must not contract to fused multiply-adds; the tests are built without contraction.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
