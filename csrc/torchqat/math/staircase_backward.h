#pragma once

#include <limits>

#include "torchqat/math/macros.h"
#include "torchqat/math/staircase.h"
#include "torchqat/math/ste.h"

// One element of the backward pass: its gradient in x and its share of the gradient in alpha.
namespace torchqat::math {

template <typename T>
struct StaircaseGrad {
  T x;
  T alpha;
};

// The derivative in alpha by region: 0 below, `inside`, `above`. `exact` puts the level in the place of
// `inside`.
struct AlphaSlope {
  bool exact;
  float inside;
  float above;
};

// A slope of 0 stops the gradient whatever it is: 0 * inf is no reason for a NaN.
template <typename T>
TORCHQAT_HD T scaled(T grad, T slope) {
  return where(slope == T(0), T(0), grad * slope);
}

// A number for each region; NaN for that of NaN.
template <typename T>
struct ByRegion {
  T below;
  T inside;
  T above;

  template <typename M>
  TORCHQAT_HD T at(const RegionBits<M>& bits) const {
    const T nan = T(std::numeric_limits<float>::quiet_NaN());
    return where(bits.high, where(bits.low, nan, above), where(bits.low, inside, below));
  }
};

// From the region alone: a slope for each. T is the op-math type, or a SIMD vector of it.
template <typename T>
struct RegionBackward {
  ByRegion<T> x;
  ByRegion<T> alpha;

  template <typename M>
  TORCHQAT_HD StaircaseGrad<T> operator()(T grad, const RegionBits<M>& bits) const {
    return {scaled(grad, x.at(bits)), scaled(grad, alpha.at(bits))};
  }
};

// The slopes of one STE and one rule. Never asked for where the STE needs x.
template <typename T, typename Ste>
TORCHQAT_HD RegionBackward<T> region_backward(const AlphaSlope& alpha) {
  RegionBackward<T> slopes{{}, {T(0), T(alpha.inside), T(alpha.above)}};
  if constexpr (RegionSte<Ste>) {
    slopes.x = {T(Ste::passes(Region::below)), T(Ste::passes(Region::inside)), T(Ste::passes(Region::above))};
  }
  return slopes;
}

// From x, for the STEs and rules that no two bits can tell.
template <typename Ste, typename T>
struct ValueBackward {
  AlphaSlope alpha;

  TORCHQAT_HD StaircaseGrad<T> operator()(T grad, T x, const Staircase<T>& stair) const {
    auto slopes = region_backward<T, Ste>(alpha);
    if constexpr (!RegionSte<Ste>) slopes.x = same(Ste::slope(x, stair));
    if (alpha.exact) slopes.alpha.inside = stair.level(x);
    return slopes(grad, stair.region_bits(x));
  }

 private:
  static TORCHQAT_HD ByRegion<T> same(T slope) { return {slope, slope, slope}; }
};

}  // namespace torchqat::math
