#pragma once

#include <cmath>

#include "torchqat/math/macros.h"

// What formulas need beyond arithmetic and comparisons, so that their T may be a number or, with overloads of
// its own, a SIMD vector of numbers.
namespace torchqat::math {

template <typename T>
TORCHQAT_HD T where(bool condition, T yes, T no) {
  return condition ? yes : no;
}

// The larger and the smaller of two; where x is NaN, x.
template <typename T>
TORCHQAT_HD T at_least(T x, T low) {
  return where(low > x, low, x);
}
template <typename T>
TORCHQAT_HD T at_most(T x, T high) {
  return where(high < x, high, x);
}

TORCHQAT_HD inline float ceiling(float x) { return std::ceil(x); }
TORCHQAT_HD inline double ceiling(double x) { return std::ceil(x); }
TORCHQAT_HD inline float nearest(float x) { return std::rint(x); }
TORCHQAT_HD inline double nearest(double x) { return std::rint(x); }

// The same as ceiling() for numbers that an int holds: every processor has vectors for that.
template <typename T>
TORCHQAT_HD T small_ceiling(T x) {
  const T whole = static_cast<T>(static_cast<int>(x));
  return whole < x ? whole + T(1) : whole;
}

TORCHQAT_HD inline float exponential(float x) { return std::exp(x); }
TORCHQAT_HD inline double exponential(double x) { return std::exp(x); }

}  // namespace torchqat::math
