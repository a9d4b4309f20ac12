// cpu/simd*.h, compiled for one instruction set.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "torchqat/cpu/simd_exponential.h"
#include "torchqat/cpu/simd_memory.h"
#include "torchqat/cpu/simd_sums.h"

namespace torchqat::TORCHQAT_ISA {
namespace {

bool is_here() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2");
#else
  return true;
#endif
}

template <typename T>
class Simd : public ::testing::Test {
  void SetUp() override {
    if (!is_here()) GTEST_SKIP() << "this processor lacks the instruction set";
  }
};
using Types = ::testing::Types<float, double>;
TYPED_TEST_SUITE(Simd, Types);

// f of every value, a vector at a time.
template <typename T, typename F>
std::vector<T> mapped(std::vector<T> values, F&& f) {
  const size_t n = values.size();
  values.resize((n / Vec<T>::size + 1) * Vec<T>::size);
  for (size_t i = 0; i < values.size(); i += Vec<T>::size) store(&values[i], f(load(&values[i])));
  values.resize(n);
  return values;
}

TYPED_TEST(Simd, ExponentialIsWithinTwoUnitsInTheLastPlace) {
  using T = TypeParam;
  const double end = std::is_same_v<T, float> ? 110 : 760;  // beyond the smallest positive result
  std::vector<T> x{T(0), T(-0.0)};
  for (double v = 1e-9; v < end; v *= 1.00037) x.push_back(static_cast<T>(-v));
  const auto y = mapped(x, [](Vec<T> v) { return exponential(v); });
  for (size_t i = 0; i < x.size(); ++i) {
    const long double exact = std::exp(static_cast<long double>(x[i]));
    const T near = static_cast<T>(exact);
    const T unit = std::max(std::nextafter(near, T(2)) - near, std::numeric_limits<T>::denorm_min());
    ASSERT_LE(std::abs(static_cast<long double>(y[i]) - exact), 2 * static_cast<long double>(unit)) << x[i];
  }
  const auto limits = mapped<T>({-std::numeric_limits<T>::infinity(), std::numeric_limits<T>::quiet_NaN()},
                                [](Vec<T> v) { return exponential(v); });
  EXPECT_EQ(limits[0], T(0));
  EXPECT_TRUE(std::isnan(limits[1]));
}

TYPED_TEST(Simd, RoundsAsTheFormulasDo) {
  using T = TypeParam;
  std::vector<T> x;
  for (int i = 0; i <= 4 * 255; ++i) {
    const T v = T(i) / 4;
    x.insert(x.end(), {v, std::nextafter(v, T(300)), std::max(T(0), std::nextafter(v, T(-1)))});
  }
  const auto up = mapped(x, [](Vec<T> v) { return ceiling(v); });
  const auto small = mapped(x, [](Vec<T> v) { return small_ceiling(v); });
  const auto near = mapped(x, [](Vec<T> v) { return nearest(v); });
  for (size_t i = 0; i < x.size(); ++i) {
    ASSERT_EQ(up[i], math::ceiling(x[i])) << x[i];
    ASSERT_EQ(small[i], math::small_ceiling(x[i])) << x[i];
    ASSERT_EQ(near[i], math::nearest(x[i])) << x[i];
  }
  const auto nan = std::numeric_limits<T>::quiet_NaN();
  EXPECT_TRUE(std::isnan(mapped<T>({nan}, [](Vec<T> v) { return ceiling(v); })[0]));
  EXPECT_TRUE(std::isnan(mapped<T>({nan}, [](Vec<T> v) { return nearest(v); })[0]));
}

TYPED_TEST(Simd, MasksAreBits) {
  using T = TypeParam;
  for (unsigned bits = 0; bits < 1u << Vec<T>::size; bits += bits < 256 ? 1 : 251) {
    T lanes[Vec<T>::size];
    store(lanes, where(from_bits<T>(bits), Vec<T>(T(1)), Vec<T>(T(0))));
    for (int i = 0; i < Vec<T>::size; ++i) ASSERT_EQ(lanes[i], T(bits >> i & 1));
    const unsigned back = to_bits(load(lanes) > Vec<T>(T(0)));
    ASSERT_EQ(back, bits);
    ASSERT_EQ(to_bits(!from_bits<T>(bits)), ~bits & ((1u << Vec<T>::size) - 1));
  }
}

TYPED_TEST(Simd, SumsHaveOneOrder) {
  using T = TypeParam;
  T group[kGroup];
  for (int i = 0; i < kGroup; ++i) group[i] = T(1) / T(3 + i);
  LaneSums sums;
  for (int lane = 0; lane < kGroup; lane += Vec<T>::size) sums.add(lane, load(group + lane));
  double s[8];
  for (int i = 0; i < 8; ++i) s[i] = static_cast<double>(group[i]) + static_cast<double>(group[i + 8]);
  EXPECT_EQ(sums.total(), ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])));
}

TYPED_TEST(Simd, CountsAndTotalsAreOfAllLanes) {
  using T = TypeParam;
  LaneCounts<T> counts;
  Vec<T> sum = T(0);
  for (unsigned bits : {0u, 1u, 0b10u, ~0u}) {
    counts.add(from_bits<T>(bits));
    sum = where(from_bits<T>(bits), sum + Vec<T>(T(0.5)), sum);
  }
  EXPECT_EQ(counts.total(), 2 + Vec<T>::size);
  EXPECT_EQ(total(sum), (2 + Vec<T>::size) / 2.);
}

TYPED_TEST(Simd, BoundsAreTheFormulas) {
  using T = TypeParam;
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const auto same = [](T a, T b) { return std::memcmp(&a, &b, sizeof(T)) == 0; };
  for (const T bound : {T(2), T(0), T(-0.0), nan}) {
    const std::vector<T> x{T(-1), T(-0.0), T(0), T(2), T(5), nan};
    const auto least = mapped(x, [=](Vec<T> v) { return at_least(v, Vec<T>(bound)); });
    const auto most = mapped(x, [=](Vec<T> v) { return at_most(v, Vec<T>(bound)); });
    for (size_t i = 0; i < x.size(); ++i) {
      EXPECT_TRUE(same(least[i], math::at_least(x[i], bound))) << x[i] << " " << bound;
      EXPECT_TRUE(same(most[i], math::at_most(x[i], bound))) << x[i] << " " << bound;
    }
  }
}

TYPED_TEST(Simd, CompressKeepsTheOrder) {
  using T = TypeParam;
  for (unsigned bits = 0; bits < 1u << Vec<T>::size; bits += bits < 256 ? 1 : 251) {
    std::vector<T> from(Vec<T>::size), to(Vec<T>::size), expected;
    for (int i = 0; i < Vec<T>::size; ++i) {
      from[i] = T(i + 1);
      if (bits >> i & 1) expected.push_back(from[i]);
    }
    to.resize(compress(to.data(), from_bits<T>(bits), load(from.data())) - to.data());
    ASSERT_EQ(to, expected) << bits;
  }
}

TYPED_TEST(Simd, StreamsAreStores) {
  using T = TypeParam;
  alignas(kVectorBytes) T to[kGroup] = {};
  T from[kGroup];
  for (int i = 0; i < kGroup; ++i) from[i] = T(1) / T(3 + i);
  ASSERT_TRUE(is_aligned(to));
  ASSERT_FALSE(is_aligned(to + 1));
  for (int lane = 0; lane < kGroup; lane += Vec<T>::size) stream(to + lane, load(from + lane));
  _mm_sfence();
  EXPECT_TRUE(std::equal(from, from + kGroup, to));
}

TYPED_TEST(Simd, WholeNumbersAreBytes) {
  using T = TypeParam;
  for (int first = 0; first < 256; first += kGroup) {
    T group[kGroup];
    uint8_t bytes[kGroup];
    for (int i = 0; i < kGroup; ++i) group[i] = T(first + i);
    for (int lane = 0; lane < kGroup; lane += Vec<T>::size) store(bytes + lane, load(group + lane));
    for (int i = 0; i < kGroup; ++i) ASSERT_EQ(bytes[i], first + i);
  }
}

template <typename T>
class SimdHalf : public Simd<T> {};
using Halves = ::testing::Types<c10::Half, c10::BFloat16>;
TYPED_TEST_SUITE(SimdHalf, Halves);

template <typename S>
void expect_same(S actual, S expected, float value) {
  if (std::isnan(static_cast<float>(expected))) {
    ASSERT_TRUE(std::isnan(static_cast<float>(actual))) << value;
  } else {
    ASSERT_EQ(actual.x, expected.x) << value;
  }
}

// All values there are, and the floats half way between neighbors and next to that.
TYPED_TEST(SimdHalf, LoadsAndStoresAsScalarsDo) {
  using S = TypeParam;
  constexpr int size = Vec<float>::size;
  for (unsigned first = 0; first < 1u << 16; first += size) {
    S from[size];
    float values[size];
    for (int i = 0; i < size; ++i) from[i] = S(static_cast<uint16_t>(first + i), S::from_bits());
    store(values, load(from));
    for (int i = 0; i < size; ++i) {
      const float expected = from[i];
      ASSERT_TRUE(values[i] == expected || (std::isnan(values[i]) && std::isnan(expected)));
      const float next = S(static_cast<uint16_t>(first + i + 1), S::from_bits());
      if (std::isfinite(expected) && std::isfinite(next)) values[i] = expected / 2 + next / 2;
    }
    for (const float towards : {0.0F, -HUGE_VALF, HUGE_VALF}) {
      float shifted[size];
      S to[size];
      for (int i = 0; i < size; ++i)
        shifted[i] = towards == 0 ? values[i] : std::nextafter(values[i], towards);
      store(to, load(shifted));
      for (int i = 0; i < size; ++i) expect_same(to[i], S(shifted[i]), shifted[i]);
    }
  }
}

}  // namespace
}  // namespace torchqat::TORCHQAT_ISA
