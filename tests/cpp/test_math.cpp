#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "torchqat/math/channel_view.h"
#include "torchqat/math/feature_affinity.h"
#include "torchqat/math/pack_codes.h"
#include "torchqat/math/staircase.h"
#include "torchqat/math/staircase_backward.h"
#include "torchqat/math/ste.h"
#include "torchqat/math/step_codes.h"
#include "torchqat/math/weight_levels.h"

// The formulas of math/ against references that are written from their definitions and share no line with
// them.
namespace torchqat::math {
namespace {

using Quad = __float128;  // a quotient of two doubles rounded through it is the correctly rounded quotient

template <typename T>
constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
template <typename T>
constexpr T kInf = std::numeric_limits<T>::infinity();
template <typename T>
constexpr T kTiny = std::numeric_limits<T>::denorm_min();

template <typename T>
class Math : public ::testing::Test {};
using OpMathTypes = ::testing::Types<float, double>;
TYPED_TEST_SUITE(Math, OpMathTypes);

// Equal, with NaN equal to itself and 0 different from -0.
template <typename T>
bool identical(T a, T b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

// The value of a half-precision bit pattern (5 bits of exponent, 10 of fraction).
double half_value(unsigned bits) {
  const int exponent = static_cast<int>(bits >> 10 & 31);
  const double fraction = bits & 1023;
  double value = std::ldexp(exponent == 0 ? fraction : fraction + 1024, std::max(exponent, 1) - 25);
  if (exponent == 31) value = fraction == 0 ? kInf<double> : kNan<double>;
  return std::copysign(value, bits >> 15 == 0 ? 1.0 : -1.0);
}

// And of a bfloat16 one: the upper half of a float.
double bfloat16_value(unsigned bits) {
  const uint32_t word = bits << 16;
  float value;
  std::memcpy(&value, &word, sizeof(value));
  return value;
}

template <typename T>
T quotient(T x, T alpha) {
  return static_cast<T>(static_cast<Quad>(x) / static_cast<Quad>(alpha));
}

// The steps that the rounded quotient x / alpha lies above: 0, and 1 .. top - 1. x > 0 is above the first,
// however small the quotient.
template <typename T>
T reference_level(T x, T alpha, int bits) {
  if (std::isnan(x) || !(alpha > 0)) return kNan<T>;
  if (!(x > 0)) return 0;
  const T q = quotient(x, alpha);
  int level = 1;
  while (level < std::pow(2, bits) - 1 && q > T(level)) ++level;
  return T(level);
}

template <typename T>
T reference_value(T level, T alpha) {
  return level == 0 ? T(0) : static_cast<T>(static_cast<Quad>(level) * static_cast<Quad>(alpha));
}

// BCGD's three regions, and NaN.
template <typename T>
Region reference_region(T x, T alpha, int bits) {
  if (std::isnan(x) || !(alpha > 0)) return Region::nan;
  if (x <= 0) return Region::below;
  return x > T((std::pow(2, bits) - 1) * alpha) ? Region::above : Region::inside;
}

// The level, or one of the two states that follow the levels.
template <typename T>
bool has_right_state(const Staircase<T>& stair, T x, T level, Region region, int bits) {
  const int states = 1 << bits;
  const T expected = region == Region::nan ? T(states + 1) : region == Region::above ? T(states) : level;
  const auto [low, high] = stair.region_bits_of_state(expected);
  return identical(stair.state(x), expected) && identical(stair.level_of_state(expected), level) &&
         low == bits_of(region).low && high == bits_of(region).high;
}

template <typename T>
void expect_staircase(T x, T alpha, int bits) {
  const Staircase<T> stair(alpha, bits);
  const T level = reference_level(x, alpha, bits);
  const bool right = identical(stair.level(x), level) && identical(stair(x), reference_value(level, alpha)) &&
                     stair.code(x) == (level > 0 ? static_cast<uint8_t>(level) : 0) &&
                     stair.region(x) == reference_region(x, alpha, bits) &&
                     has_right_state(stair, x, level, reference_region(x, alpha, bits), bits);
  if (right) return;
  ADD_FAILURE() << "x " << x << ", alpha " << alpha << ", bits " << bits << ": level " << stair.level(x)
                << " for " << level << ", value " << stair(x) << ", region "
                << int{static_cast<uint8_t>(stair.region(x))};
}

TYPED_TEST(Math, StaircaseOfEveryHalfAndBFloat16) {
  using T = TypeParam;
  for (const T alpha : {T(0.1), T(0.25), T(1) / 3, T(1), T(2.7), T(6e-8), T(3e4)}) {
    for (const int bits : {1, 2, 4}) {
      for (unsigned pattern = 0; pattern < 65536 && !this->HasFailure(); ++pattern) {
        expect_staircase(T(half_value(pattern)), alpha, bits);
        expect_staircase(T(bfloat16_value(pattern)), alpha, bits);
      }
    }
  }
}

TYPED_TEST(Math, StaircaseOnAndBesideEachStep) {
  using T = TypeParam;
  T alpha = T(0.001);
  for (int i = 0; i < 100; ++i, alpha *= T(1.09871)) {
    for (int bits = 1; bits <= 8; ++bits) {
      for (int k = 0; k <= (1 << bits); ++k) {
        const T step = alpha * T(k);
        for (const T x : {step, std::nextafter(step, kInf<T>), std::nextafter(step, -kInf<T>)}) {
          expect_staircase(x, alpha, bits);
        }
      }
    }
  }
}

// Where a step is a number of the type, the cell ends on it and not beside it. (Elsewhere rounding decides.)
TYPED_TEST(Math, StaircaseCellsAreClosedOnTheRight) {
  using T = TypeParam;
  for (const T alpha : {T(0.25), T(1), T(3), T(0.625)}) {
    const Staircase<T> stair(alpha, 8);
    for (int k = 1; k < 255; ++k) {
      EXPECT_EQ(stair.level(alpha * T(k)), T(k));
      EXPECT_EQ(stair(alpha * T(k)), alpha * T(k));
      EXPECT_EQ(stair.level(alpha * T(k) + alpha / 1024), T(k + 1));
    }
  }
}

// 0.1 * 3 lies on the grid of 0.1 and must stay there; multiplying by 1 / 0.1 would carry such points a step
// up.
TYPED_TEST(Math, StaircaseDivides) {
  using T = TypeParam;
  int moved = 0;
  for (int i = 1; i <= 1000; ++i) {
    const T alpha = T(i) / 1000;
    for (int k = 1; k <= 15; ++k) {
      const T x = static_cast<T>(static_cast<Quad>(alpha) * k);
      EXPECT_EQ(Staircase<T>(alpha, 5).level(x), std::ceil(quotient(x, alpha)));
      moved += std::ceil(x * (1 / alpha)) != std::ceil(quotient(x, alpha));
    }
  }
  EXPECT_GT(moved, 0) << "the points chosen cannot tell a division from a multiplication";
}

TYPED_TEST(Math, StaircaseAtTheEndsOfTheRange) {
  using T = TypeParam;
  const T largest = std::numeric_limits<T>::max();
  const T smallest = std::numeric_limits<T>::min();
  const std::vector<T> alphas = {kTiny<T>, smallest, T(0.5), T(1e30), largest};
  const std::vector<T> points = {T(0),    T(-0.0),  kTiny<T>, -kTiny<T>, smallest, T(1),
                                 largest, -largest, kInf<T>,  -kInf<T>,  kNan<T>};
  for (const T alpha : alphas) {
    for (const T x : points) {
      for (int bits = 1; bits <= 8; ++bits) expect_staircase(x, alpha, bits);
    }
  }
  const Staircase<T> stair(T(0.5), 2);
  EXPECT_TRUE(identical(stair(T(-0.0)), T(0)));
  EXPECT_TRUE(identical(stair(T(-3)), T(0)));
  EXPECT_EQ(stair(kTiny<T>), T(0.5));
  EXPECT_EQ(stair(kInf<T>), T(1.5));
  EXPECT_EQ(stair(-kInf<T>), T(0));
  EXPECT_EQ((Staircase<T>(largest, 1)(kTiny<T>)), largest) << "x / alpha underflows";
}

TYPED_TEST(Math, StaircaseIsNanUnlessAlphaIsPositive) {
  using T = TypeParam;
  for (const T alpha : {T(0), T(-0.0), T(-1), -kTiny<T>, -kInf<T>, kNan<T>}) {
    for (const T x : {T(-1), T(0), T(0.5), T(2), kInf<T>, -kInf<T>, kNan<T>}) {
      const Staircase<T> stair(alpha, 3);
      EXPECT_TRUE(std::isnan(stair(x))) << alpha << " " << x;
      EXPECT_TRUE(std::isnan(stair.level(x)));
      EXPECT_EQ(stair.code(x), 0);
      EXPECT_EQ(stair.region(x), Region::nan);
    }
  }
}

// One cell that never ends.
TYPED_TEST(Math, StaircaseOfInfiniteAlpha) {
  using T = TypeParam;
  const Staircase<T> stair(kInf<T>, 2);
  for (const T x : {T(0), T(-2), -kInf<T>}) EXPECT_TRUE(identical(stair(x), T(0)));
  for (const T x : {kTiny<T>, T(7), std::numeric_limits<T>::max()}) {
    EXPECT_EQ(stair(x), kInf<T>);
    EXPECT_EQ(stair.code(x), 1);
    EXPECT_EQ(stair.region(x), Region::inside);
  }
}

// ------------------------------------------------------------------------------------------- the backward
// pass

// The STEs as the papers state them: the derivative of the proxy function at x.
template <typename T>
T reference_slope(const std::string& ste, T x, T alpha, int bits) {
  const long double q = (std::pow(2.0L, bits) - 1) * alpha;
  const bool inside = reference_region(x, alpha, bits) == Region::inside;
  if (ste == "identity") return 1;
  if (ste == "relu") return x > 0 ? 1 : 0;
  if (ste == "clipped_relu") return inside ? 1 : 0;
  if (ste == "log_tailed_relu") return x <= 0 ? 0 : inside ? 1 : static_cast<T>(1 / (1 + (x - q)));
  if (ste == "reverse_exponential") return x <= 0 ? 0 : static_cast<T>(std::exp(-x / q));
  ADD_FAILURE() << "no reference for the STE " << ste;
  return kNan<T>;
}

// The derivative in alpha (BCGD, section 2; PACT): what holds inside, and 2^b - 1 above the last step.
template <typename T>
T reference_alpha_slope(const std::string& rule, T x, T alpha, int bits) {
  const T top = T(std::pow(2, bits) - 1);
  const Region region = reference_region(x, alpha, bits);
  if (region == Region::below) return 0;
  if (region == Region::above) return top;
  if (rule == "exact") return reference_level(x, alpha, bits);
  if (rule == "three_valued") return T(std::pow(2, bits - 1));
  if (rule == "min") return 1;
  if (rule == "pact") return 0;
  ADD_FAILURE() << "no reference for the rule " << rule;
  return kNan<T>;
}

// Calls f(ste, rule) for every pair of the catalogue.
template <typename F>
void for_each_pair(F f) {
  const auto with_rules = [&](auto ste) {
    std::apply([&](auto... rule) { (f(ste, rule), ...); }, AlphaGradRules{});
  };
  std::apply([&](auto... ste) { (with_rules(ste), ...); }, SteCatalogue{});
}

template <typename Rule>
AlphaSlope alpha_slope(int bits) {
  const int top = staircase_top(bits);
  return {Rule::exact, static_cast<float>(Rule::inside(top)), static_cast<float>(top)};
}

// The points where the slopes change, their neighbors, and the middle of the pieces.
template <typename T>
std::vector<T> backward_points(T alpha, int bits) {
  std::vector<T> points = {-kInf<T>, T(-1), -kTiny<T>, T(-0.0), T(0), kTiny<T>, kInf<T>};
  for (int k = 1; k <= (1 << bits); ++k) {
    const T step = alpha * T(k);
    for (const T x : {step, std::nextafter(step, kInf<T>), std::nextafter(step, T(0)), step - alpha / 2}) {
      points.push_back(x);
    }
  }
  return points;
}

template <typename T>
void expect_near(T value, T expected) {
  EXPECT_NEAR(value, expected, 8 * std::numeric_limits<T>::epsilon() * std::abs(expected));
}

TYPED_TEST(Math, BackwardIsThePapersForEverySteAndRule) {
  using T = TypeParam;
  for_each_pair([&](auto ste, auto rule) {
    using Ste = decltype(ste);
    for (const T alpha : {T(0.1), T(0.25), T(1.7)}) {
      for (int bits = 1; bits <= 4; ++bits) {
        const Staircase<T> stair(alpha, bits);
        const ValueBackward<Ste, T> backward{alpha_slope<decltype(rule)>(bits)};
        for (const T x : backward_points(alpha, bits)) {
          SCOPED_TRACE(std::string(ste.name) + " " + std::string(rule.name) + " at " + std::to_string(x));
          const auto grads = backward(T(-3), x, stair);
          expect_near(grads.x, -3 * reference_slope(std::string(ste.name), x, alpha, bits));
          EXPECT_EQ(grads.alpha, -3 * reference_alpha_slope(std::string(rule.name), x, alpha, bits));
        }
      }
    }
  });
}

// Two bits tell what x itself tells, where they are all that is kept.
TYPED_TEST(Math, BackwardFromTheRegionIsThatFromX) {
  using T = TypeParam;
  for_each_pair([&](auto ste, auto rule) {
    using Ste = decltype(ste);
    for (int bits = 1; bits <= 4; ++bits) {
      const auto slope = alpha_slope<decltype(rule)>(bits);
      if (!RegionSte<Ste> || (slope.exact && bits > 1)) continue;
      for (const T alpha : {T(0.3), T(-1), kNan<T>}) {
        const Staircase<T> stair(alpha, bits);
        const auto table = region_backward<T, Ste>(slope);
        auto points = backward_points(T(0.3), bits);
        points.push_back(kNan<T>);
        for (const T x : points) {
          for (const T grad : {T(2.5), T(0), kInf<T>, kNan<T>}) {
            const auto from_region = table(grad, bits_of(stair.region(x)));
            const auto from_x = ValueBackward<Ste, T>{slope}(grad, x, stair);
            EXPECT_TRUE(identical(from_region.x, from_x.x)) << ste.name << " " << rule.name << " " << x;
            EXPECT_TRUE(identical(from_region.alpha, from_x.alpha))
                << ste.name << " " << rule.name << " " << x;
          }
        }
      }
    }
  });
}

TYPED_TEST(Math, BackwardOfWhatIsNotANumber) {
  using T = TypeParam;
  for_each_pair([&](auto ste, auto rule) {
    const ValueBackward<decltype(ste), T> backward{alpha_slope<decltype(rule)>(2)};
    EXPECT_TRUE(std::isnan(backward(T(1), kNan<T>, Staircase<T>(T(1), 2)).x));
    for (const T x : {T(-1), T(1), T(9)}) {
      const auto grads = backward(T(1), x, Staircase<T>(T(0), 2));
      EXPECT_TRUE(std::isnan(grads.x) && std::isnan(grads.alpha)) << ste.name << " " << rule.name;
    }
  });
  EXPECT_EQ((ValueBackward<ClippedRelu, T>{{false, 2, 3}}(kInf<T>, T(-1), Staircase<T>(T(1), 2)).x), T(0))
      << "a slope of 0 stops an infinite gradient";
}

TEST(Ste, AreFoundByName) {
  std::string found;
  EXPECT_TRUE(visit_named<SteCatalogue>("relu", [&](auto ste) { found = ste.name; }));
  EXPECT_EQ(found, "relu");
  EXPECT_FALSE(visit_named<SteCatalogue>("relu6", [](auto) { FAIL(); }));
  EXPECT_TRUE(RegionSte<Identity> && RegionSte<Relu> && RegionSte<ClippedRelu>);
  EXPECT_FALSE(RegionSte<LogTailedRelu> || RegionSte<ReverseExponential>);
}

// --------------------------------------------------------------------------------------------- memory
// layouts

template <int bits>
void expect_groups_of_codes() {
  for (const int64_t n : {0, 1, 7, 8, 9, 16, 17})
    EXPECT_EQ(code_bytes(n, bits), bits * std::ceil(static_cast<double>(n) / 8));
  std::vector<uint8_t> group(bits, 0);
  const auto code = [](int i) { return static_cast<unsigned>(i * 40503 + 7) % (1u << bits); };
  for (int i = 0; i < kCodesTogether; ++i) put_code<bits>(group.data(), i, code(i));
  for (int i = 0; i < kCodesTogether; ++i) EXPECT_EQ(code_at<bits>(group.data(), i), code(i));
}

TEST(StepCodes, LieInGroupsOfEight) {
  expect_groups_of_codes<2>();
  expect_groups_of_codes<4>();
  expect_groups_of_codes<8>();
  expect_groups_of_codes<16>();
}

TEST(StepCodes, HaveRoomForEveryState) {
  for (int bits = 1; bits <= 8; ++bits) EXPECT_GE(1 << state_bits(bits), (1 << bits) + 2);
}

// Every bit of a word in turn, and all: moving bits is linear, so that no other word needs a look.
template <int bits>
void expect_packed_word() {
  const auto expect = [](uint64_t codes) {
    uint64_t packed = 0;
    uint64_t low = 0;
    for (int i = 0; i < 8 * bits; ++i) {
      const uint64_t bit = codes >> (i / bits * 8 + i % bits) & 1;
      packed |= bit << i;
      low |= bit << (i / bits * 8 + i % bits);
    }
    EXPECT_EQ(pack_word<bits>(codes), packed) << bits << " bits, " << codes;
    EXPECT_EQ(unpack_word<bits>(static_cast<PackedWord<bits>>(packed)), low) << bits << " bits, " << codes;
  };
  for (int i = 0; i < 64; ++i) expect(uint64_t{1} << i);
  expect(~uint64_t{0});
  for (const int64_t n : {0, 1, 7, 8, 9, 16, 17}) EXPECT_EQ(packed_bytes(n, bits), (n * bits + 7) / 8);
}

TEST(PackCodes, MovesEveryBitToItsPlace) {
  expect_packed_word<1>();
  expect_packed_word<2>();
  expect_packed_word<4>();
  expect_packed_word<8>();
}

TEST(ChannelView, NumbersTheElementsOfEachChannel) {
  for (const ChannelView view :
       {ChannelView{1, 24}, ChannelView{3, 4}, ChannelView{4, 1}, ChannelView{24, 1}}) {
    std::vector<int64_t> seen(view.channels, 0);
    for (int64_t p = 0; p < 24; ++p) {
      const int64_t channel = view.channels == 1 ? 0 : p % (view.channels * view.inner) / view.inner;
      EXPECT_EQ(view.channel_at(p), channel);
      EXPECT_EQ(view.position(channel, seen[channel]++), p);
    }
  }
}

// ----------------------------------------------------------------------------------------------------
// weights

// The nearest of 0, +-1 .. +-top to |w| / step; halfway between two, the one nearer to 0.
template <typename T>
T reference_weight_level(T w, T step, int bits) {
  if (bits == 1) return w < 0 ? -1 : 1;
  const int top = static_cast<int>(std::pow(2, bits - 1)) - 1;
  if (std::isnan(w) || !(step > 0)) return 0;
  const T q = quotient(std::abs(w), step);
  int level = 0;
  while (level<top&& static_cast<Quad>(q)> level + Quad(0.5)) ++level;
  return T(w < 0 ? -level : level);
}

TYPED_TEST(Math, WeightLevelOfEveryHalf) {
  using T = TypeParam;
  for (const T step : {T(0.01), T(1) / 3, T(77)}) {
    for (const int bits : {1, 2, 3, 8}) {
      for (unsigned pattern = 0; pattern < 65536 && !this->HasFailure(); ++pattern) {
        const T w = T(half_value(pattern));
        EXPECT_EQ(weight_level(w, step, bits), reference_weight_level(w, step, bits)) << w << " " << step;
      }
    }
  }
}

TYPED_TEST(Math, WeightLevelOnAndBesideEachTie) {
  using T = TypeParam;
  T step = T(0.003);
  for (int i = 0; i < 100; ++i, step *= T(1.0791)) {
    for (int bits = 1; bits <= 8; ++bits) {
      for (int k = -weight_top(bits) - 1; k <= weight_top(bits) + 1; ++k) {
        const T tie = step * (T(k) + T(0.5));
        for (const T w : {tie, std::nextafter(tie, kInf<T>), std::nextafter(tie, -kInf<T>), step * T(k)}) {
          EXPECT_EQ(weight_level(w, step, bits), reference_weight_level(w, step, bits)) << w << " " << step;
        }
      }
    }
  }
  EXPECT_EQ(weight_level(T(0.5), T(1), 3), T(0));
  EXPECT_EQ(weight_level(T(-1.5), T(1), 3), T(-1));
}

TYPED_TEST(Math, WeightLevelOfWhatIsNotANumber) {
  using T = TypeParam;
  for (int bits = 2; bits <= 8; ++bits) {
    const T top = T((1 << (bits - 1)) - 1);
    EXPECT_EQ(weight_top(bits), top);
    EXPECT_EQ(weight_level(kInf<T>, T(1), bits), top);
    EXPECT_EQ(weight_level(-kInf<T>, T(1), bits), -top);
    EXPECT_EQ(weight_level(kNan<T>, T(1), bits), T(0));
    for (const T step : {T(0), T(-1), kNan<T>, kInf<T>}) EXPECT_EQ(weight_level(T(2), step, bits), T(0));
  }
  EXPECT_EQ(weight_top(1), 1);
  EXPECT_EQ(weight_level(T(-0.0), T(1), 1), T(1)) << "sign(0) = +1";
  EXPECT_EQ(weight_level(kNan<T>, T(1), 1), T(1));
}

// feature affinity

TYPED_TEST(Math, GradientOfAUnitColumnIsItsDifference) {
  using T = TypeParam;
  const double f[] = {0.3, -2, 1.1};
  const double g[] = {1, 0.5, -0.7};  // the gradient of a
  const double eps = 0.25;
  // g . f / (|f| + eps)
  const auto value = [&](int moved, double by) {
    double square = 0, dot = 0;
    for (int i = 0; i < 3; ++i) {
      const double x = f[i] + (i == moved ? by : 0);
      square += x * x;
      dot += g[i] * x;
    }
    return dot / (std::sqrt(square) + eps);
  };
  double square = 0, dot = 0;
  for (int i = 0; i < 3; ++i) square += f[i] * f[i];
  const UnitColumn<T> column{T(std::sqrt(square)), T(eps)};
  for (int i = 0; i < 3; ++i) dot += g[i] * f[i];
  for (int i = 0; i < 3; ++i) {
    const double difference = (value(i, 1e-5) - value(i, -1e-5)) / 2e-5;
    EXPECT_NEAR(column.gradient(T(g[i]), T(f[i]), T(dot)), difference, 1e-6);
  }
}

TYPED_TEST(Math, AColumnOfZerosHasNoGradient) {
  using T = TypeParam;
  for (const T eps : {T(0), T(1e-5)}) {
    const UnitColumn<T> column{T(0), eps};
    EXPECT_EQ(column.scale(), T(0));
    EXPECT_EQ(column.gradient(T(3), T(0), T(0)), T(0));
  }
}

TYPED_TEST(Math, SignsAndMagnitudes) {
  using T = TypeParam;
  for (const T s : {kTiny<T>, T(2), kInf<T>}) {
    EXPECT_EQ(sign(s), T(1));
    EXPECT_EQ(sign(-s), T(-1));
    EXPECT_EQ(magnitude(-s), s);
  }
  EXPECT_EQ(sign(T(0)), T(0));
  EXPECT_TRUE(std::isnan(sign(kNan<T>)) && std::isnan(magnitude(kNan<T>)));
}

TEST(AffinityFlops, AreThoseOfTheProducts) {
  const auto flops = affinity_flops(3, 5, 7, 2);
  EXPECT_EQ(flops.direct, 2 * 7 * 7 * (3 + 5 + 3));                        // A'A, B'B, AS
  EXPECT_EQ(flops.gram, 2 * 7 * (3 * 3 + 3 * 5 + 5 * 5 + 3 * 3 + 3 * 5));  // AA', AB', BB', (AA')A, (AB')B
  EXPECT_EQ(flops.fast,
            2 * 7 * 2 * (3 + 5 + 3 + 5 + 3 + 3 + 3));  // AV, BV, A'(AV), B'(BV), AR, (AR)V', (AV)R'
}

}  // namespace
}  // namespace torchqat::math
