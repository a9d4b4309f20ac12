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

  TORCHQAT_HD float at(Region region) const {
    return region == Region::below ? 0.0F : (region == Region::inside ? inside : above);
  }
};

// A slope of 0 stops the gradient whatever it is: 0 * inf is no reason for a NaN.
template <typename T>
TORCHQAT_HD T scaled(T grad, T slope) {
  return slope == T(0) ? T(0) : grad * slope;
}

// From the region alone: a slope for each. T is the op-math type.
template <typename T>
struct RegionBackward {
  struct Slopes {
    T below;
    T inside;
    T above;

    TORCHQAT_HD T at(Region region) const {
      const T below_or_inside = region == Region::below ? below : inside;
      const T above_or_nan = region == Region::above ? above : std::numeric_limits<T>::quiet_NaN();
      return region == Region::below || region == Region::inside ? below_or_inside : above_or_nan;
    }
  };
  Slopes x;
  Slopes alpha;

  TORCHQAT_HD StaircaseGrad<T> operator()(T grad, Region region) const {
    return {scaled(grad, x.at(region)), scaled(grad, alpha.at(region))};
  }
};

// The slopes of one STE and one rule. Never asked for where the STE needs x.
template <typename T, typename Ste>
RegionBackward<T> region_backward(const AlphaSlope& alpha) {
  RegionBackward<T> slopes{{}, {T(0), T(alpha.inside), T(alpha.above)}};
  if constexpr (RegionSte<Ste>) {
    slopes.x = {T(Ste::passes(Region::below)), T(Ste::passes(Region::inside)), T(Ste::passes(Region::above))};
  }
  return slopes;
}

// From x, for the STEs and rules that no two bits can tell.
template <typename Ste, typename T>
struct ValueBackward {
  AlphaSlope alpha_slope;

  TORCHQAT_HD StaircaseGrad<T> operator()(T grad, T x, const Staircase<T>& stair) const {
    const Region region = stair.region(x);
    if (region == Region::nan) {
      const T nan = x + stair.zero;
      return {nan, nan};
    }
    const T d_alpha = alpha_slope.exact ? stair.level(x) : T(alpha_slope.at(region));
    return {scaled(grad, slope(x, stair, region)), scaled(grad, d_alpha)};
  }

 private:
  static TORCHQAT_HD T slope(T x, const Staircase<T>& stair, Region region) {
    if constexpr (RegionSte<Ste>) {
      return Ste::passes(region) ? T(1) : T(0);
    } else {
      return Ste::slope(x, stair);
    }
  }
};

}  // namespace torchqat::math
