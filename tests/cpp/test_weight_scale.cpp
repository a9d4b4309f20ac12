#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "torchqat/cpu/radix_sort.h"
#include "torchqat/math/exact_scale.h"
#include "weight_kinds.h"

// The least-squares scale: the search over sorted magnitudes, against trying every breakpoint.
namespace torchqat::math {
namespace {

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

TYPED_TEST(WeightScale, MagnitudesAreSortedByTheirBits) {
  constexpr TypeParam kTiny = std::numeric_limits<TypeParam>::denorm_min();
  constexpr TypeParam kHuge = std::numeric_limits<TypeParam>::max();
  std::mt19937_64 random(0);
  for (const int n : {0, 1, 2, 2047, 2048, 2049, 70001}) {
    for (const int spread : {0, 3, 60}) {  // equal numbers; leading bits in common; all sizes
      std::vector<TypeParam> magnitudes(n);
      for (auto& m : magnitudes) {
        m = std::ldexp(TypeParam(1 + random() % 1000),
                       spread == 0 ? 0 : static_cast<int>(random() % spread) - spread);
      }
      if (n > 3) std::copy_n(std::vector<TypeParam>{0, kTiny, kHuge}.begin(), 3, magnitudes.begin());
      auto expected = magnitudes;
      std::sort(expected.rbegin(), expected.rend());
      sort_magnitudes(magnitudes);
      EXPECT_EQ(magnitudes, expected) << n << " " << spread;
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
