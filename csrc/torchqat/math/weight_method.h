#pragma once

#include <cmath>
#include <cstdint>

#include "torchqat/math/macros.h"
#include "torchqat/math/weight_fit.h"
#include "torchqat/math/weight_levels.h"

// The ways to quantise weights that share a scale: assign levels by a cut, then fit the scale to them.
namespace torchqat::math {

enum class WeightMethod {
  exact,  // the least-squares scale, which is the cut as well
  lloyd,  // one step from the papers' start: cut at the nearest level of step size 2 max|w| / (2^bits - 1)
  twn,    // ternary: keep the magnitudes of at least 0.7 mean|w| (Li, Zhang, Liu 2016)
};

// What a first look at the weights tells.
struct MagnitudeSums {
  double sum = 0;
  double largest = 0;

  template <typename T>
  TORCHQAT_HD void add(T w) {
    const double magnitude = std::abs(w);
    sum += magnitude;
    largest = std::fmax(largest, magnitude);
  }
  TORCHQAT_HD MagnitudeSums operator+(const MagnitudeSums& other) const {
    return {sum + other.sum, std::fmax(largest, other.largest)};
  }

  // The cut, as far as sums over n weights tell it: at one bit the scale itself. NaN where a weight is NaN or
  // infinite.
  TORCHQAT_HD double cut(WeightMethod method, int64_t bits, int64_t n) const {
    const double zero = sum - sum;  // or NaN
    if (bits == 1) return sum / n + zero;
    return zero + (method == WeightMethod::twn ? 0.7 * (sum / n) : largest / (0.5 * ((1 << bits) - 1)));
  }
};

template <typename T>
TORCHQAT_HD T assigned_level(T w, T cut, WeightMethod method, int64_t bits) {
  if (method != WeightMethod::twn) return weight_level(w, cut, bits);
  const T kept = std::abs(w) >= cut ? T(1) : T(0);
  return w < T(0) ? T(0) - kept : kept;
}

}  // namespace torchqat::math
