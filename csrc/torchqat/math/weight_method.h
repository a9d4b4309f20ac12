#pragma once

#include <cmath>
#include <cstdint>

#include "torchqat/math/macros.h"
#include "torchqat/math/weight_fit.h"
#include "torchqat/math/weight_levels.h"

// The ways to quantize weights that share a scale: assign levels by a cut, then fit the scale to them.
namespace torchqat::math {

enum class WeightMethod {
  exact,  // the least-squares scale, which is the cut as well
  lloyd,  // one step from the papers' start: cut at the nearest level of the step size lloyd_start()
  twn,    // ternary: keep the magnitudes of at least twn_threshold()
};

TORCHQAT_HD inline double lloyd_start(double largest, int64_t bits) {
  return 2 * largest / static_cast<double>((1 << bits) - 1);
}

// Li, Zhang, Liu 2016, from the mean magnitude.
TORCHQAT_HD constexpr double twn_threshold(double mean) { return 0.7 * mean; }

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
    return zero + (method == WeightMethod::twn ? twn_threshold(sum / n) : lloyd_start(largest, bits));
  }
};

template <typename T>
TORCHQAT_HD T assigned_level(T w, T cut, WeightMethod method, int64_t bits) {
  if (method != WeightMethod::twn) return weight_level(w, cut, bits);
  return with_sign_of(w, KeptLevel<T>{cut}(std::abs(w)));
}

}  // namespace torchqat::math
