#pragma once

#include "torchqat/cpu/simd.h"

namespace torchqat::TORCHQAT_ISA {

// What the exponential of a floating-point type takes: ln 2 in two parts, of which the product of the first
// with a small integer is exact; the terms of the series for |r| <= ln 2 / 2; the bits of the format.
template <typename T>
struct ExponentialOf;
template <>
struct ExponentialOf<float> {
  static constexpr float ln2_high = 0x1.63p-1F;
  static constexpr float ln2_low = -0x1.bd0106p-13F;
  static constexpr int terms = 8;
  static constexpr int mantissa = 23;
  static constexpr int bias = 127;
  static constexpr float lowest = -104;  // whose exponential rounds to 0
};
template <>
struct ExponentialOf<double> {
  static constexpr double ln2_high = 0x1.62e42feep-1;
  static constexpr double ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr int terms = 14;
  static constexpr int mantissa = 52;
  static constexpr int bias = 1023;
  static constexpr double lowest = -746;
};

// exp(x) for x <= 0, to about one unit in the last place: x = n ln 2 + r, the series of exp(r), and 2^n in
// two factors, as the result may be too small for one.
template <typename T>
Vec<T> exponential(Vec<T> x) {
  using Of = ExponentialOf<T>;
  using Int = Raw<IntOf<T>>;
  const Vec<T> bounded = at_least(x, Vec<T>(Of::lowest));
  const Int n = __builtin_convertvector((bounded * Vec<T>(1.4426950408889634) - Vec<T>(0.5)).raw, Int);
  const Vec<T> count(__builtin_convertvector(n, Raw<T>));
  const Vec<T> r = (bounded - count * Vec<T>(Of::ln2_high)) - count * Vec<T>(Of::ln2_low);
  Vec<T> series(1);
  for (int k = Of::terms; k > 0; --k) series = series * r * Vec<T>(T(1) / T(k)) + Vec<T>(1);
  const Int half = n >> 1;
  const auto power = [](Int exponent) {
    return Vec<T>(bit_cast<Raw<T>>((exponent + Of::bias) << Of::mantissa));
  };
  return where(x == x, series * power(half) * power(n - half), x);
}

}  // namespace torchqat::TORCHQAT_ISA
