#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "torchqat/math/macros.h"
#include "torchqat/math/weight_levels.h"

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
  T divisor;  // of the gradient: the gradient scaler's factor, negative to maximise
  bool nesterov;

  // The new y. The direction is torch.optim.SGD's for the gradient g and the blended y.
  TORCHQAT_HD T operator()(T y, T w, T g) const {
    y = keep * y + blend * w;
    return y - lr * (g / divisor + weight_decay * y);
  }
  // The same with momentum. The first buffer is the gradient itself, without dampening.
  TORCHQAT_HD T operator()(T y, T w, T g, T& buffer, bool first) const {
    y = keep * y + blend * w;
    const T d = g / divisor + weight_decay * y;
    buffer = first ? d : momentum * buffer + undamped * d;
    return y - lr * (nesterov ? d + momentum * buffer : buffer);
  }
};

// How the scale is found from the new y.
enum class Projection {
  mean,         // one bit: the mean of |y|, the optimum
  ternary,      // two bits: the optimum
  warm_lloyd,   // three bits and more: the best scale for the levels that the scale before assigns
  start_lloyd,  // the best scale for the levels that the papers' step 2 max|y| / (2^bits - 1) assigns
  twn,          // two bits: the mean of the |y| of at least 0.7 mean|y|
};

// The level of a magnitude, by one of three rules.
template <typename T>
struct TopLevel {
  TORCHQAT_HD T operator()(T) const { return T(1); }
};
template <typename T>
struct NearestLevel {
  T step;
  int64_t bits;
  TORCHQAT_HD T operator()(T magnitude) const { return weight_level(magnitude, step, bits); }
};
template <typename T>
struct KeptLevel {
  T threshold;
  TORCHQAT_HD T operator()(T magnitude) const { return magnitude >= threshold ? T(1) : T(0); }
};

template <typename T, typename Level>
TORCHQAT_HD T signed_level(T y, const Level& level) {
  const T q = level(std::abs(y));
  return y < T(0) ? -q : q;
}

// What a pass over y adds up: <|y|, q>, <q, q> and the largest |y|. A y that is not finite leaves its mark in
// the overlap, as 0 * inf is NaN.
struct StepSums {
  double overlap = 0;
  double energy = 0;
  double peak = 0;

  template <typename T>
  TORCHQAT_HD void add(T magnitude, T level) {
    overlap += static_cast<double>(magnitude) * static_cast<double>(level);
    energy += static_cast<double>(level) * static_cast<double>(level);
    peak = magnitude > peak ? magnitude : peak;
  }
  TORCHQAT_HD StepSums operator+(const StepSums& other) const {
    return {overlap + other.overlap, energy + other.energy, peak > other.peak ? peak : other.peak};
  }

  TORCHQAT_HD bool finite() const { return overlap - overlap == 0; }
  // The best scale for the levels; 0 where there are none, NaN where a y is not finite.
  TORCHQAT_HD double scale() const {
    return finite() ? (energy > 0 ? overlap / energy : 0) : overlap - overlap;
  }
  // The papers' step size.
  TORCHQAT_HD double start(int64_t bits) const {
    return finite() ? 2 * peak / static_cast<double>((1 << bits) - 1) : overlap - overlap;
  }
};

// The scale after the first pass over y: final for `mean` and `warm_lloyd`, for the others what the second
// pass assigns levels by. Where the scale before assigned no levels, a warm start has the papers' step
// instead.
TORCHQAT_HD inline double scale_after_update(const StepSums& sums, Projection projection, int64_t bits) {
  switch (projection) {
    case Projection::warm_lloyd:
      return sums.energy > 0 ? sums.scale() : sums.start(bits);
    case Projection::start_lloyd:
      return sums.start(bits);
    case Projection::twn:
      return 0.7 * sums.scale();
    default:
      return sums.scale();
  }
}

// True where the second pass over y adds up what the first step's levels give.
TORCHQAT_HD constexpr bool needs_second_sums(Projection p) {
  return p == Projection::start_lloyd || p == Projection::twn;
}

}  // namespace torchqat::math
