#pragma once

#include <cmath>
#include <cstdint>

#include "torchqat/math/macros.h"

namespace torchqat::math {

// Highest level of b-bit weights: {-1, 1} at one bit, 0, +-1 .. +-(2^(b-1) - 1) above; two bits are ternary.
TORCHQAT_HD constexpr int weight_top(int64_t bits) { return bits == 1 ? 1 : (1 << (bits - 1)) - 1; }

// The level of w for step size `step`: nearest, ties towards zero as in the authors' code
// (level j on (j - 1/2, j + 1/2] * step), sign(0) = +1 at one bit. NaN, and any w where step is not > 0,
// has level 0 (one bit: +1 for NaN; the step plays no part).
template <typename T>
TORCHQAT_HD T weight_level(T w, T step, int64_t bits) {
  if (bits == 1) return w < T(0) ? T(-1) : T(1);
  const T top = T(weight_top(bits));
  const T k = std::ceil(std::abs(w) / step - T(0.5));
  const T level = k > T(0) && step > T(0) ? (k > top ? top : k) : T(0);
  return w < T(0) ? T(0) - level : level;  // never -0
}

}  // namespace torchqat::math
