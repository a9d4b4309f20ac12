#pragma once

#include <cmath>

#include "torchqat/math/macros.h"

namespace torchqat::math {

// How well an assignment of levels q fits weights w. The best scale for it is <|w|,q> / <q,q>, and it leaves
// the error |w|^2 - score()^2: the least-squares scale belongs to the assignment of the highest score.
struct WeightFit {
  double energy = 0;   // <q, q>
  double overlap = 0;  // <|w|, q>

  template <typename T>
  TORCHQAT_HD void add(T w, T level) {
    energy += static_cast<double>(level) * static_cast<double>(level);
    overlap += static_cast<double>(w) * static_cast<double>(level);
  }
  TORCHQAT_HD WeightFit operator+(const WeightFit& other) const {
    return {energy + other.energy, overlap + other.overlap};
  }

  TORCHQAT_HD double scale() const { return energy > 0 ? overlap / energy : 0.0; }
  TORCHQAT_HD double score() const { return energy > 0 ? overlap / std::sqrt(energy) : 0.0; }
};

// Scores that differ by less than this share are equal: it is what float64 sums of millions of weights can
// tell.
constexpr double kScoreSlack = 1e-15;

// As the step size falls, assignments move from `from` to `to` by steps of energy whose overlap per energy
// falls from at most `steep` to at least `shallow`, in this order. The path is concave, so it lies below the
// tangents at both ends; overlap^2 / energy is convex along a line, so no assignment on the path scores more
// than the best of the two ends and the point where the tangents meet.
TORCHQAT_HD inline double score_bound(const WeightFit& from, const WeightFit& to, double steep,
                                      double shallow) {
  const double ends = std::fmax(from.score(), to.score());
  const double energy = to.energy - from.energy;
  if (!(steep > shallow) || !(energy > 0)) return ends;
  const double meet = (to.overlap - from.overlap - shallow * energy) / (steep - shallow);
  const double x = std::fmin(std::fmax(meet, 0.0), energy);
  return std::fmax(ends, WeightFit{from.energy + x, from.overlap + steep * x}.score());
}

}  // namespace torchqat::math
