#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "torchqat/math/macros.h"
#include "torchqat/math/weight_fit.h"
#include "torchqat/math/weight_method.h"

// One step of blended coarse gradient descent (BCGD; Yin, Zhang, Lyu, Osher, Qi, Xin 2018), element by
// element, and the projection that follows it: w <- scale * level with the scale of each tensor or channel
// fitted to the new y.
namespace torchqat::math {

template <typename T>
struct StepRule {
  T lr;
  T momentum;
  T undamped;  // 1 - dampening
  T weight_decay;
  T keep;  // 1 - blend
  T blend;
  T divisor;  // of the gradient: the gradient scaler's factor, negative to maximize
  bool nesterov;
  bool divides = true;  // false to save the division by a divisor of 1

  // The new y. The direction is torch.optim.SGD's for the gradient g and the blended y.
  TORCHQAT_HD T operator()(T y, T w, T g) const {
    y = keep * y + blend * w;
    return y - lr * (unscaled(g) + weight_decay * y);
  }
  // The same with momentum. The first buffer is the direction itself, without dampening.
  TORCHQAT_HD T operator()(T y, T w, T g, T& buffer, bool first) const {
    y = keep * y + blend * w;
    const T d = unscaled(g) + weight_decay * y;
    buffer = first ? d : momentum * buffer + undamped * d;
    return y - lr * (nesterov ? d + momentum * buffer : buffer);
  }
  TORCHQAT_HD T unscaled(T g) const { return divides ? g / divisor : g; }
};

// How the scale is found from the new y.
enum class Projection {
  mean,     // one bit: the mean of |y|, the optimum
  ternary,  // two bits: the optimum
  warm,     // three bits and more: the scale that fits best among the levels by step sizes around the scale
            // before
  lloyd,    // the scale that fits the levels by the papers' step size, lloyd_start()
  twn,      // two bits: the mean of those |y| that are at least twn_threshold()
};

// Step sizes that a warm start tries, as shares of the scale before. One Lloyd step alone stays in the next
// local optimum, of which there are many at eight bits; the neighbors get it out.
constexpr int kWarmSteps = 5;
TORCHQAT_HD inline double warm_share(int i) {
  constexpr double shares[kWarmSteps] = {1, 31. / 32, 33. / 32, 7. / 8, 9. / 8};
  return shares[i];
}

// The level of a magnitude in an assignment that a warm start tries: the nearest to magnitude / step, to
// within the rounding of 1 / step. Which way a tie goes plays no part: the scale is fitted to what it gives.
template <typename T>
struct WarmLevel {
  T inverse = 0;
  T top = 0;

  WarmLevel() = default;
  TORCHQAT_HD WarmLevel(T step, int64_t bits) {
    const T one_by_step = T(1) / step;
    if (!(step > T(0) && one_by_step <= std::numeric_limits<T>::max())) return;
    inverse = one_by_step;
    top = static_cast<T>(weight_top(bits));
  }
  template <typename U>  // every lane of a vector as one number
  explicit WarmLevel(const WarmLevel<U>& other) : inverse(other.inverse), top(other.top) {}
  TORCHQAT_HD T operator()(T magnitude) const { return nearest(at_most(magnitude * inverse, top)); }
};

// What a pass over y adds up: how well N assignments of levels fit, and the largest |y|. A y that is not
// finite leaves its mark in every overlap, as 0 * inf is NaN.
template <size_t N>
struct StepSums {
  WeightFit fits[N];
  double peak = 0;

  template <typename T, typename Level>
  TORCHQAT_HD void add(T magnitude, const Level (&levels)[N]) {
    for (size_t i = 0; i < N; ++i) fits[i].add(magnitude, levels[i](magnitude));
    peak = magnitude > peak ? magnitude : peak;
  }
  TORCHQAT_HD StepSums operator+(const StepSums& other) const {
    StepSums sum;
    for (size_t i = 0; i < N; ++i) sum.fits[i] = fits[i] + other.fits[i];
    sum.peak = other.peak > peak ? other.peak : peak;
    return sum;
  }

  // x, or NaN where a y is not finite.
  TORCHQAT_HD double checked(double x) const { return x + (fits[0].overlap - fits[0].overlap); }
  TORCHQAT_HD double scale() const { return checked(fits[0].scale()); }
  // The papers' step size.
  TORCHQAT_HD double start(int64_t bits) const { return checked(lloyd_start(peak, bits)); }
  // The scale of the best of the assignments, of equally good ones the first; the papers' step size where
  // none of them has a level but 0.
  TORCHQAT_HD double best_scale(int64_t bits) const {
    WeightFit best;
    for (const auto& fit : fits) best = fit.score() > best.score() * (1 + kScoreSlack) ? fit : best;
    return best.energy > 0 ? checked(best.scale()) : start(bits);
  }
};

// The scale after the pass that made y: final for `mean` and `warm`, for `lloyd` and `twn` what gives y its
// levels.
template <size_t N>
TORCHQAT_HD double scale_after_update(const StepSums<N>& sums, Projection projection, int64_t bits) {
  switch (projection) {
    case Projection::warm:
      return sums.best_scale(bits);
    case Projection::lloyd:
      return sums.start(bits);
    case Projection::twn:
      return twn_threshold(sums.scale());
    default:
      return sums.scale();
  }
}

// True where another pass over y fits the scale to the levels.
TORCHQAT_HD constexpr bool refits(Projection p) { return p == Projection::lloyd || p == Projection::twn; }

}  // namespace torchqat::math
