#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "torchqat/math/exact_scale.h"
#include "torchqat/math/ternary_near.h"
#include "torchqat/math/weight_levels.h"

// The least-squares scale: the search over sorted magnitudes and the one over histograms, against trying
// every breakpoint one after the other.
namespace torchqat::math {
namespace {

// A distribution of weights: its name, and its i-th of n draws.
struct Kind {
  const char* name;
  std::function<double(std::mt19937_64&, int64_t, int64_t)> draw;
};

double normal(std::mt19937_64& random) { return std::normal_distribution<double>()(random); }
double uniform(std::mt19937_64& random) { return std::uniform_real_distribution<double>()(random); }

const std::vector<Kind>& kinds() {
  static const std::vector<Kind> all = {
      {"normal", [](auto& r, int64_t, int64_t) { return 0.05 * normal(r); }},
      {"uniform", [](auto& r, int64_t, int64_t) { return uniform(r); }},
      {"exponential", [](auto& r, int64_t, int64_t) { return -std::log(uniform(r) + 1e-12); }},
      {"cauchy", [](auto& r, int64_t, int64_t) { return normal(r) / (normal(r) + 1e-12); }},
      {"log-normal", [](auto& r, int64_t, int64_t) { return std::exp(3 * normal(r)); }},
      {"S_k / sqrt(k) is flat",
       [](auto&, int64_t i, int64_t) { return std::sqrt(double(i + 1)) - std::sqrt(double(i)); }},
      {"all equal", [](auto&, int64_t, int64_t) { return 0.1; }},
      {"two values", [](auto&, int64_t i, int64_t) { return i % 7 == 0 ? 1.0 : 1e-3; }},
      {"neighbors", [](auto& r, int64_t, int64_t) { return 0.1 + 1e-8 * static_cast<double>(r() % 5); }},
      {"two clusters",
       [](auto& r, int64_t, int64_t) { return (r() % 2 ? 1.0 : 0.3) * (1 + 1e-6 * normal(r)); }},
      {"on a grid", [](auto& r, int64_t, int64_t) { return 0.013 * static_cast<double>(r() % 8); }},
      {"one huge", [](auto& r, int64_t i, int64_t) { return i == 3 ? 1e30 : 1e-3 * normal(r); }},
      {"one tiny", [](auto& r, int64_t i, int64_t) { return i == 3 ? 1e-30 : normal(r); }},
      {"float denormals", [](auto& r, int64_t, int64_t) { return 1e-42 * normal(r); }},
      {"mostly zero", [](auto& r, int64_t, int64_t) { return r() % 10 == 0 ? normal(r) : 0.0; }},
      {"all zero", [](auto&, int64_t, int64_t) { return 0.0; }},
  };
  return all;
}

template <typename T>
std::vector<T> weights(const Kind& kind, int64_t n) {
  std::mt19937_64 random(static_cast<unsigned>(n));
  std::vector<T> w(n);
  for (int64_t i = 0; i < n; ++i) w[i] = static_cast<T>(kind.draw(random, i, n));
  return w;
}

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

// The best score, overlap / sqrt(energy), of all assignments that a step size can make; in long double.
template <typename T>
long double best_score(const std::vector<T>& w, int top) {
  std::vector<std::pair<long double, std::pair<int, long double>>> moves;
  for (const T value : w) {
    const long double m = std::abs(static_cast<long double>(value));
    for (int j = 1; j <= top && m > 0; ++j) moves.push_back({m / (j - 0.5L), {2 * j - 1, m}});
  }
  std::sort(moves.rbegin(), moves.rend());
  long double energy = 0, overlap = 0, best = 0;
  for (const auto& [breakpoint, move] : moves) {
    energy += move.first, overlap += move.second;
    best = std::max(best, overlap / std::sqrt(energy));
  }
  return best;
}

// The score of the levels that a scale assigns.
template <typename T>
long double score_of(const std::vector<T>& w, double scale, int64_t bits) {
  if (scale == 0) return 0;
  long double energy = 0, overlap = 0;
  for (const T value : w) {
    const long double level = weight_level(static_cast<double>(value), scale, bits);
    energy += level * level, overlap += level * static_cast<long double>(value);
  }
  return overlap / std::sqrt(energy);
}

struct Sorted {
  template <typename T>
  explicit Sorted(std::vector<T> w) : sums{0} {
    for (const T value : w) magnitudes.push_back(std::abs(static_cast<double>(value)));
    std::sort(magnitudes.rbegin(), magnitudes.rend());
    for (const double m : magnitudes) sums.push_back(sums.back() + m);
  }
  int64_t size() const { return static_cast<int64_t>(magnitudes.size()); }
  double magnitude(int64_t i) const { return magnitudes.at(i); }
  double sum_of_first(int64_t count) const { return sums.at(count); }

  std::vector<double> magnitudes;
  std::vector<double> sums;
};

template <int kEnds>
class Alone {
 public:
  static constexpr int kDepth = kEnds;
  static int first_level() { return 1; }
  static int stride() { return 1; }
  StepState join(const StepState& state) {
    ++evaluations;
    return state;
  }
  const StepState& state(int slot) const { return states_.at(slot); }
  void set_state(int slot, const StepState& state) { states_.at(slot) = state; }
  int64_t& count(int slot, int own) { return counts_.at(slot).at(own); }

  int evaluations = 0;

 private:
  std::vector<StepState> states_ = std::vector<StepState>(kDepth);
  std::vector<std::vector<int64_t>> counts_ =
      std::vector<std::vector<int64_t>>(kDepth, std::vector<int64_t>(weight_top(8)));
};

template <int kEnds, typename T>
std::pair<double, int> search(const std::vector<T>& w, int64_t bits) {
  const Sorted sorted(w);
  Alone<kEnds> alone;
  const double scale = ExactScaleSearch(sorted, weight_top(bits), alone).best().scale();
  return {scale, alone.evaluations};
}

template <typename T>
class WeightScale : public ::testing::Test {};
using OpMathTypes = ::testing::Types<float, double>;
TYPED_TEST_SUITE(WeightScale, OpMathTypes);

TYPED_TEST(WeightScale, SearchFindsTheBestOfAllBreakpoints) {
  for (const Kind& kind : kinds()) {
    for (const int64_t n : {1, 2, 3, 17, 600}) {
      const auto w = weights<TypeParam>(kind, n);
      for (int64_t bits = 2; bits <= 8; ++bits) {
        const auto [scale, evaluations] = search<kSearchDepth>(w, bits);
        const long double best = best_score(w, weight_top(bits));
        EXPECT_GE(score_of(w, scale, bits), best * (1 - 1e-14L)) << kind.name << " " << n << " " << bits;
        EXPECT_LE(evaluations, 2000) << kind.name << " " << n << " " << bits;
      }
    }
  }
}

TYPED_TEST(WeightScale, SearchThatMustForgetFindsTheSame) {
  for (const Kind& kind : kinds()) {
    const auto w = weights<TypeParam>(kind, 300);
    for (const int64_t bits : {2, 4, 8}) {
      const double scale = search<kSearchDepth>(w, bits).first;
      const long double best = score_of(w, scale, bits);
      EXPECT_GE(score_of(w, search<4>(w, bits).first, bits), best * (1 - 1e-14L)) << kind.name << " " << bits;
      EXPECT_GE(score_of(w, search<7>(w, bits).first, bits), best * (1 - 1e-14L)) << kind.name << " " << bits;
    }
  }
}

TYPED_TEST(WeightScale, HistogramsFindTheBestTernaryScale) {
  for (const Kind& kind : kinds()) {
    for (const int64_t n : {1, 2, 512, 513, 30'000}) {
      const auto w = weights<TypeParam>(kind, n);
      const double scale = ternary_scale(w);
      EXPECT_GE(score_of(w, scale, 2), best_score(w, 1) * (1 - 1e-14L)) << kind.name << " " << n;
    }
  }
}

TYPED_TEST(WeightScale, HistogramsDoNotSeeTheOrder) {
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

TYPED_TEST(WeightScale, OfAnyScaleBeforeIsTheBest) {
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

TYPED_TEST(WeightScale, OneLookIsEnoughForNormalWeightsNearTheScaleBefore) {
  const auto w = weights<TypeParam>(kinds().front(), 200'000);
  for (const double share : {1., .995, 1.005, .8, 1.3}) {
    bool looked_twice = false;
    scale_near(w, share, looked_twice);
    EXPECT_EQ(looked_twice, share < .9 || share > 1.1) << share;
  }
}

TYPED_TEST(WeightScale, OfWhatIsNotFiniteIsNan) {
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

TEST(ScoreBound, IsReachedByTheStateWhereTheTangentsMeet) {
  const WeightFit from{4, 3}, to{10, 5.5};
  // Two steps: 2 of energy at 0.75, then 4 at 0.25.
  EXPECT_DOUBLE_EQ(score_bound(from, to, 0.75, 0.25), WeightFit({6, 4.5}).score());
  // The ends themselves, where the path between is a straight line.
  EXPECT_DOUBLE_EQ(score_bound(from, to, 2.5 / 6, 2.5 / 6), to.score());
  EXPECT_DOUBLE_EQ(score_bound({}, {}, 1, 0.5), 0);
}

}  // namespace
}  // namespace torchqat::math
