#pragma once

#include <immintrin.h>

#include <array>

#include "torchqat/cpu/simd_memory.h"

// Sums in float64.
namespace torchqat::TORCHQAT_ISA {

// v in float64: one vector, or two.
inline std::array<Vec<double>, 1> widened(Vec<double> v) { return {v}; }
#if defined(__AVX512F__)
inline std::array<Vec<double>, 2> widened(Vec<float> v) {
  return {Vec<double>(_mm512_cvtps_pd(_mm512_castps512_ps256(v.raw))),
          Vec<double>(_mm512_cvtps_pd(_mm512_extractf32x8_ps(v.raw, 1)))};
}
#elif defined(__AVX2__)
inline std::array<Vec<double>, 2> widened(Vec<float> v) {
  return {Vec<double>(_mm256_cvtps_pd(_mm256_castps256_ps128(v.raw))),
          Vec<double>(_mm256_cvtps_pd(_mm256_extractf128_ps(v.raw, 1)))};
}
#else
inline std::array<Vec<double>, 2> widened(Vec<float> v) {
  return {Vec<double>(_mm_cvtps_pd(v.raw)), Vec<double>(_mm_cvtps_pd(_mm_movehl_ps(v.raw, v.raw)))};
}
#endif

template <typename T>
double total(Vec<T> v) {
  Vec<double> sum(0);
  for (const auto part : widened(v)) sum = sum + part;
  double lanes[Vec<double>::size];
  store(lanes, sum);
  for (int half = Vec<double>::size / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Adds v, lane by lane, to as many sums in float64.
template <typename T>
void add_lanes(double* sums, Vec<T> v) {
  for (const auto part : widened(v)) {
    store(sums, load(sums) + part);
    sums += part.size;
  }
}

// How often a condition held in each lane, and in all.
template <typename T>
class LaneCounts {
 public:
#ifdef __AVX512F__
  void add(Mask<float> m) { lanes_ = _mm512_mask_sub_epi32(lanes_, m.bits, lanes_, _mm512_set1_epi32(-1)); }
  void add(Mask<double> m) { lanes_ = _mm512_mask_sub_epi64(lanes_, m.bits, lanes_, _mm512_set1_epi64(-1)); }
#else
  void add(Mask<T> m) { lanes_ -= m.bits; }  // all bits: -1
#endif
  double total() const {
    double sum = 0;
    for (int i = 0; i < Vec<T>::size; ++i) sum += static_cast<double>(bit_cast<Lanes>(lanes_)[i]);
    return sum;
  }

 private:
  using Lanes = Raw<IntOf<T>>;
#ifdef __AVX512F__
  __m512i lanes_ = {};
#else
  Lanes lanes_ = {};
#endif
};

// Sums of a group's lanes i and i + 8, for i = 0..7, and their total: in an order that vectors do not show
// in.
class LaneSums {
 public:
  // v holds the lanes from `lane` on.
  template <typename T>
  void add(int lane, Vec<T> v) {
    for (const auto part : widened(v)) {
      add_part(lane, part);
      lane += part.size;
    }
  }
  // Their products, which float64 holds in full for float32.
  template <typename T>
  void add_products(int lane, Vec<T> a, Vec<T> b) {
    const auto wide_a = widened(a);
    const auto wide_b = widened(b);
    for (size_t i = 0; i < wide_a.size(); ++i) {
      add_part(lane, wide_a[i] * wide_b[i]);
      lane += wide_a[i].size;
    }
  }
  double total() const {
    const auto s = [&](int lane) { return sums_[lane / Vec<double>::size].raw[lane % Vec<double>::size]; };
    return ((s(0) + s(1)) + (s(2) + s(3))) + ((s(4) + s(5)) + (s(6) + s(7)));
  }

 private:
  void add_part(int lane, Vec<double> part) {
    auto& sum = sums_[lane % 8 / part.size];
    sum = sum + part;
  }

  Vec<double> sums_[8 / Vec<double>::size] = {};
};

}  // namespace torchqat::TORCHQAT_ISA
