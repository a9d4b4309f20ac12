#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "torchqat/math/ternary_near.h"
#include "weight_kinds.h"

// The least-squares scale of ternary weights: by histograms, and from the scale before.
namespace torchqat::math {
namespace {

template <typename T>
std::vector<T> magnitudes(std::vector<T> w) {
  for (T& value : w) value = std::abs(value);
  return w;
}

template <typename T>
double ternary_scale(const std::vector<T>& w) {
  auto all = magnitudes(w);
  return exact_ternary_scale(all);
}

template <typename T>
class TernaryScale : public ::testing::Test {};
using OpMathTypes = ::testing::Types<float, double>;
TYPED_TEST_SUITE(TernaryScale, OpMathTypes);

TYPED_TEST(TernaryScale, HistogramsFindTheBestTernaryScale) {
  for (const Kind& kind : kinds()) {
    for (const int64_t n : {1, 2, 512, 513, 30'000}) {
      const auto w = weights<TypeParam>(kind, n);
      const double scale = ternary_scale(w);
      EXPECT_GE(score_of(w, scale, 2), best_score(w, 1) * (1 - 1e-14L)) << kind.name << " " << n;
    }
  }
}

TYPED_TEST(TernaryScale, HistogramsDoNotSeeTheOrder) {
  for (const Kind& kind : kinds()) {
    auto w = weights<TypeParam>(kind, 20'000);
    const double scale = ternary_scale(w);
    std::shuffle(w.begin(), w.end(), std::mt19937_64(1));
    EXPECT_EQ(ternary_scale(w), scale) << kind.name;
  }
}

// As a step does it, whose scale before was `share` of the best.
template <typename T>
double scale_near(const std::vector<T>& w, double share, bool& looked_twice) {
  const TernaryEdges<T> edges(static_cast<T>(ternary_scale(w) * share));
  const auto gathered = [&](const MagnitudeWindow<T>& window, WeightFit& above) {
    std::vector<T> kept;
    for (const T m : magnitudes(w)) {
      if (m > window.high) above.add(m, T(1));
      if (!(m <= window.low) && !(m > window.high)) kept.push_back(m);
    }
    return kept;
  };
  const auto search = [&](const MagnitudeWindow<T>& window) {
    WeightFit above;
    auto kept = gathered(window, above);
    TernarySearch<T> found(window, above);
    found.run(kept);
    return found.best();
  };
  TernarySums sums;
  for (const T m : magnitudes(w)) {
    for (int i = 0; i < kTernaryEdges; ++i) {
      if (m > edges.at[i]) sums.above[i].add(m, T(1));
    }
    sums.above[kTernaryEdges].add(m, T(1));
    sums.peak = std::max(sums.peak, static_cast<double>(m));
  }
  const WeightFit near = search(edges.near());
  const auto window = window_beyond(edges, sums, near);
  looked_twice = window.has_value();
  return (window ? search(*window) : near).scale();
}

TYPED_TEST(TernaryScale, OfAnyScaleBeforeIsTheBest) {
  for (const Kind& kind : kinds()) {
    for (const int64_t n : {1, 2, 30, 3'000, 30'000}) {
      const auto w = weights<TypeParam>(kind, n);
      const long double best = best_score(w, 1) * (1 - 1e-14L);
      for (const double share : {1., .995, 1.006, .9, 1.2, .01, 100., 0.}) {
        bool looked_twice = false;
        const double scale = scale_near(w, share, looked_twice);
        EXPECT_GE(score_of(w, scale, 2), best) << kind.name << " " << n << " " << share;
      }
    }
  }
}

TYPED_TEST(TernaryScale, OneLookIsEnoughForNormalWeightsNearTheScaleBefore) {
  const auto w = weights<TypeParam>(kinds().front(), 200'000);
  for (const double share : {1., .995, 1.005, .8, 1.3}) {
    bool looked_twice = false;
    scale_near(w, share, looked_twice);
    EXPECT_EQ(looked_twice, share < .9 || share > 1.1) << share;
  }
}

TYPED_TEST(TernaryScale, OfWhatIsNotFiniteIsNan) {
  using T = TypeParam;
  for (const int64_t n : {5, 5000}) {
    for (const T bad : {std::numeric_limits<T>::quiet_NaN(), std::numeric_limits<T>::infinity(),
                        -std::numeric_limits<T>::infinity()}) {
      auto w = weights<T>(kinds().front(), n);
      w[n / 2] = bad;
      EXPECT_TRUE(std::isnan(ternary_scale(w))) << n << " " << bad;
    }
  }
}

}  // namespace
}  // namespace torchqat::math
