#pragma once

#include <cmath>
#include <optional>

#include "torchqat/math/ternary_scale.h"

// The least-squares scale of ternary weights that had a scale before and moved a little. One pass over them
// takes sums above thresholds around the one before, half its scale, and gathers the few magnitudes near it.
// The best k is sought among these; that no k elsewhere is better, score_bound shows from the sums, or it
// tells where to look.
namespace torchqat::math {

// Shares of the threshold before: close where the score is flattest. For a scale that moved by half a percent
// they settle normal, uniform and Laplace distributions.
constexpr double kTernaryShares[] = {5.5, 1.75, 1.24, 1.085, 1.025, .975, .917, .78, .45};
constexpr int kTernaryEdges = 9;
constexpr int kNear = 4;  // magnitudes between this edge and the next are gathered

template <typename T>
struct TernaryEdges {
  T at[kTernaryEdges];

  explicit TernaryEdges(T scale) {
    for (int i = 0; i < kTernaryEdges; ++i) at[i] = static_cast<T>(scale / T(2) * T(kTernaryShares[i]));
  }
  MagnitudeWindow<T> near() const { return {at[kNear + 1], at[kNear]}; }
};

struct TernarySums {
  // What is above each edge, by sums of up to 2^7 in T; at kNear all in float64. Then what there is at all.
  WeightFit above[kTernaryEdges + 1];
  double peak = 0;

  TernarySums operator+(const TernarySums& other) const {
    TernarySums sum;
    for (int i = 0; i <= kTernaryEdges; ++i) sum.above[i] = above[i] + other.above[i];
    sum.peak = std::fmax(peak, other.peak);
    return sum;
  }
};

// The window in which the best k lies, unless it is that of `near`, the best of those gathered.
template <typename T>
std::optional<MagnitudeWindow<T>> window_beyond(const TernaryEdges<T>& edges, const TernarySums& sums,
                                                const WeightFit& near) {
  // 2^7 roundings of float32 move a sum by 7.6e-6 at most, and with these edges a bound by four times that.
  constexpr double kMargin = 3e-5;
  if (!(edges.at[kTernaryEdges - 1] > T(0)) || !std::isfinite(sums.above[kTernaryEdges].overlap))
    return MagnitudeWindow<T>{};
  const double goal = near.score() * (1 - kMargin);
  MagnitudeWindow<T> window = edges.near();
  bool found = false;
  WeightFit from;
  for (int i = 0; i <= kTernaryEdges; ++i) {
    const WeightFit& to = sums.above[i];
    const T peak = static_cast<T>(sums.peak);
    const T high = i == 0 ? peak : std::fmin(edges.at[i - 1], peak);
    const T low = i == kTernaryEdges ? T(0) : edges.at[i];
    const bool is_empty = to.energy == from.energy;
    if (i != kNear + 1 && !is_empty && !(score_bound(from, to, high, low) < goal)) {
      window = {std::fmin(window.low, low), std::fmax(window.high, high)};
      found = true;
    }
    from = to;
  }
  if (!found) return {};
  return window;
}

}  // namespace torchqat::math
