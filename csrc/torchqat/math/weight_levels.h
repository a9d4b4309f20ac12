#pragma once

#include <cmath>
#include <cstdint>

#include "torchqat/math/macros.h"
#include "torchqat/math/select.h"

namespace torchqat::math {

// Highest level of b-bit weights: {-1, 1} at one bit, 0, +-1 .. +-(2^(b-1) - 1) above; two bits are ternary.
TORCHQAT_HD constexpr int weight_top(int64_t bits) { return bits == 1 ? 1 : (1 << (bits - 1)) - 1; }

// The level of a magnitude, by one of three rules.
template <typename T>
struct TopLevel {
  TORCHQAT_HD T operator()(T) const { return T(1); }
};
template <typename T>
struct KeptLevel {
  T threshold;
  TORCHQAT_HD T operator()(T magnitude) const { return where(magnitude >= threshold, T(1), T(0)); }
};
// The nearest of 0..top for step size `step`, ties towards zero as in the authors' code: level j on
// (j - 1/2, j + 1/2] * step. NaN, and any magnitude where step is not > 0, has level 0.
template <typename T>
struct NearestLevel {
  T step = 1;
  T top = 0;

  NearestLevel() = default;
  TORCHQAT_HD NearestLevel(T step, int64_t bits) {
    if (!(step > T(0))) return;
    this->step = step;
    top = static_cast<T>(weight_top(bits));
  }
  template <typename U>  // every lane of a vector as one number
  explicit NearestLevel(const NearestLevel<U>& other) : step(other.step), top(other.top) {}
  TORCHQAT_HD T operator()(T magnitude) const {
    const T t = magnitude / step - T(0.5);
    return small_ceiling(at_most(where(t > T(0), t, T(0)), top));
  }
};

// The level with the sign of w, +1 for 0 and NaN; a level of 0 is never -0.
template <typename T>
TORCHQAT_HD T with_sign_of(T w, T level) {
  return where(w < T(0), T(0) - level, level);
}

// The level of w for b-bit weights of step size `step`: the sign at one bit (the step plays no part), the
// nearest level above.
template <typename T>
TORCHQAT_HD T weight_level(T w, T step, int64_t bits) {
  if (bits == 1) return with_sign_of(w, T(1));
  return with_sign_of(w, NearestLevel<T>(step, bits)(std::abs(w)));
}

}  // namespace torchqat::math
