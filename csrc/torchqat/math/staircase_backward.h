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

// The derivative in alpha by region: 0 below, `inside`, `above`. `exact` puts the level in the place of `inside`.
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

// From the region alone, by table. T is the op-math type.
template <typename T>
struct RegionBackward {
  T slope[4];
  T alpha_slope[4];

  TORCHQAT_HD StaircaseGrad<T> operator()(T grad, Region region) const {
    const int i = static_cast<int>(region);
    return {scaled(grad, slope[i]), scaled(grad, alpha_slope[i])};
  }
};

// The table of one STE and one rule. Never asked for where the STE needs x.
template <typename T, typename Ste>
RegionBackward<T> region_backward(const AlphaSlope& alpha) {
  const T nan = std::numeric_limits<T>::quiet_NaN();
  RegionBackward<T> table{{T(0), T(0), T(0), nan}, {T(0), T(0), T(0), nan}};
  if constexpr (RegionSte<Ste>) {
    for (const Region region : {Region::below, Region::inside, Region::above}) {
      const int i = static_cast<int>(region);
      table.slope[i] = Ste::passes(region) ? T(1) : T(0);
      table.alpha_slope[i] = T(alpha.at(region));
    }
  }
  return table;
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
