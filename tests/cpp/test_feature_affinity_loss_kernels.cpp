#include <cmath>
#include <random>
#include <string>

#include "feature_affinity_loss.cuh"
#include "feature_maps.h"
#include "kernel_test.h"

// The kernels of feature_affinity_loss, in the order in which feature_affinity_loss.cu launches them, against
// S written out in full, in double.
namespace torchqat::cuda::testing {
namespace {

// So far may an S_ij be off. Columns have at most unit length, so a sum of products that is rounded at each
// of n steps is off by n units in the last place of 1 at the very worst; here it is a small part of that.
template <typename T>
constexpr double kEntryError = std::is_same_v<T, double> ? 1e-14 : 1e-6;

struct Shape {
  int64_t images, student, teacher, pixels;
  std::string name() const {
    return std::to_string(images) + " images of " + std::to_string(pixels) + " pixels, channels " +
           std::to_string(student) + " and " + std::to_string(teacher);
  }
};

// One pixel; around a tile of 64; two, three and four tiles a side; channels around fragments of 16, a stage
// of 16, 32 or 64, and the 64 whose gradient stays in registers.
const std::vector<Shape> kShapes = {{1, 1, 1, 1},   {3, 3, 5, 1},     {2, 16, 16, 63},  {2, 17, 3, 64},
                                    {1, 3, 17, 65}, {2, 64, 64, 64},  {1, 80, 64, 65},  {1, 16, 80, 130},
                                    {2, 5, 7, 200}, {1, 130, 40, 70}, {1, 33, 130, 66}, {3, 32, 1, 9}};

// The loss of each image, its gradient in the student's unit columns; and per element of the gradient the sum
// of the magnitudes of its terms, and of those terms whose S_ij may have either sign.
struct Expected {
  Doubles values;
  Map gradient, terms, unsure;
};

Expected expect_l1(const Map& student, const Map& teacher, double entry_error) {
  const Map a = unit_of(student), b = unit_of(teacher);
  const Map zeros(a.images, a.channels, a.pixels);
  Expected result{Doubles(a.images, 0), zeros, zeros, zeros};
  for (int64_t image = 0; image < a.images; ++image) {
    for (int64_t i = 0; i < a.pixels; ++i) {
      for (int64_t j = 0; j < a.pixels; ++j) {
        if (i == j) continue;
        double s = 0;
        for (int64_t c = 0; c < a.channels; ++c) s += a(image, c, i) * a(image, c, j);
        for (int64_t c = 0; c < b.channels; ++c) s -= b(image, c, i) * b(image, c, j);
        result.values[image] += std::abs(s);
        // |S_ij| and |S_ji| both have the slope sign(S_ij) a_j in a_i.
        const double slope = std::isnan(s) ? s : s > 0 ? 2 : s < 0 ? -2 : 0;
        for (int64_t c = 0; c < a.channels; ++c) {
          const double term = slope * a(image, c, j);
          result.gradient(image, c, i) += term;
          result.terms(image, c, i) += std::abs(2 * a(image, c, j));
          if (std::abs(s) < entry_error) result.unsure(image, c, i) += std::abs(4 * a(image, c, j));
        }
      }
    }
  }
  return result;
}

// The bits of a map, so that worlds can be compared.
using Outcome = std::tuple<Doubles, Doubles, Doubles>;

// The values of the images, and if asked for the gradient in the unit columns and in the features.
struct Result {
  Doubles values;
  Map grad_unit, grad_features;
};

// By fused multiply-adds, on unit columns in T.
template <typename T, typename scalar_t>
Outcome run_fma(const Map& s, const Map& t, const Layout& layout, bool differentiate) {
  const int64_t row = round_up(s.pixels, kRowMultiple);
  const auto columns = [&](Buffer<T>& buffer, const Map& m) {
    return UnitColumns<T>{buffer.data(), m.channels, row, m.channels * row};
  };
  const auto read_only = [](const UnitColumns<T>& u) {
    return UnitColumns<const T>{u.data, u.channels, u.row, u.image_stride};
  };
  const auto strides = layout.strides(s);
  Buffer<scalar_t> student(laid_out<scalar_t>(s, strides)), teacher(laid_out<scalar_t>(t, layout.strides(t)));
  Buffer<T> a(s.images * s.channels * row), b(s.images * t.channels * row), norms(s.images * s.pixels);
  const int64_t per_image = affinity_partials(s.images, s.pixels, differentiate);
  Buffer<double> partial(s.images * per_image), values(s.images);
  const auto f = features_at<const scalar_t>(student.data(), s, strides);
  expect_success(launch_unit_columns(f, s.images, kEps, columns(a, s), norms.data(), nullptr));
  expect_success(launch_unit_columns(features_at<const scalar_t>(teacher.data(), t, layout.strides(t)),
                                     s.images, kEps, columns(b, t), static_cast<T*>(nullptr), nullptr));
  Buffer<T> grad(differentiate ? a.size() : 0);
  FmaTiles<T> tiles{read_only(columns(a, s)), read_only(columns(b, t)), {}, s.pixels};
  if (differentiate) tiles.grad = columns(grad, s);
  expect_success(launch_l1_affinity(tiles, s.images, differentiate, partial.data(), values.data(), nullptr));
  if (!differentiate) return {values.contents(), {}, {}};

  const Wide<scalar_t> between = 7;
  Buffer<Wide<scalar_t>> out(std::vector<Wide<scalar_t>>(student.size(), between));
  const Features<const T> grads{grad.data(), s.channels, s.pixels, s.channels * row, row, 1};
  expect_success(launch_unit_columns_backward(grads, f, s.images, norms.data(), kEps, kFactor,
                                              features_at(out.data(), s, strides), nullptr));
  const Strides rows{s.channels * row, row, 1};
  auto in_columns = grad.contents();
  in_columns.resize(extent(s, rows));
  for (int64_t i = 0; i < static_cast<int64_t>(in_columns.size()); ++i) {
    if (i % row >= s.pixels) in_columns[i] = 0;  // nobody asks what is there
  }
  return {values.contents(), read_map(in_columns, s, rows, T(0)).at,
          read_map(out.contents(), s, strides, between).at};
}

// By tensor cores.
template <typename half_t>
Outcome run_tensor(const Map& s, const Map& t, const Layout& layout, bool differentiate) {
  const int64_t pixels = round_up(s.pixels, kFragment);
  const int64_t channels = round_up(s.channels, kFragment);
  const auto strides = layout.strides(s);
  Buffer<half_t> student(laid_out<half_t>(s, strides)), teacher(laid_out<half_t>(t, layout.strides(t)));
  Buffer<half_t> u(s.images * pixels * channels), v(s.images * pixels * round_up(t.channels, kFragment));
  Buffer<float> r(s.images * pixels), q(s.images * pixels), norms(s.images * s.pixels);
  const int64_t per_image = affinity_partials(s.images, s.pixels, differentiate);
  Buffer<double> partial(s.images * per_image), values(s.images);
  const auto f = features_at<const half_t>(student.data(), s, strides);
  const ScaledColumns<half_t> a{u.data(), r.data(), channels, pixels};
  const ScaledColumns<half_t> b{v.data(), q.data(), round_up(t.channels, kFragment), pixels};
  expect_success(launch_scaled_columns(f, s.images, kEps, a, norms.data(), nullptr));
  expect_success(launch_scaled_columns(features_at<const half_t>(teacher.data(), t, layout.strides(t)),
                                       s.images, kEps, b, nullptr, nullptr));
  Buffer<float> grad(differentiate ? u.size() : 0);
  const TensorTiles<half_t> tiles{{a.data, a.scale, a.channels, a.pixels},
                                  {b.data, b.scale, b.channels, b.pixels},
                                  grad.data(),
                                  s.pixels};
  expect_success(launch_l1_affinity(tiles, s.images, differentiate, partial.data(), values.data(), nullptr));
  if (!differentiate) return {values.contents(), {}, {}};

  const float between = 7;
  Buffer<float> out(std::vector<float>(student.size(), between));
  const double scale = TensorTiles<half_t>::kSignScale;
  const Features<const float> grads{grad.data(), s.channels, s.pixels, pixels * channels, 1, channels};
  expect_success(launch_unit_columns_backward(grads, f, s.images, norms.data(), kEps, kFactor / scale,
                                              features_at(out.data(), s, strides), nullptr));
  Map in_columns = s;
  const auto sums = grad.contents();
  for (int64_t i = 0; i < s.images; ++i) {
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int64_t n = 0; n < s.pixels; ++n)
        in_columns(i, c, n) = sums[(i * pixels + n) * channels + c] / scale;
    }
  }
  return {values.contents(), in_columns.at, read_map(out.contents(), s, strides, between).at};
}

Result result_of(const Outcome& outcome, const Map& like) {
  Result result{std::get<0>(outcome), like, like};
  result.grad_unit.at = std::get<1>(outcome);
  result.grad_features.at = std::get<2>(outcome);
  return result;
}

template <typename T>
Result run(const Map& s, const Map& t, const Layout& layout, bool differentiate = true) {
  const auto outcome = in_every_world([&] {
    if constexpr (kHalf<T>) {
      return run_tensor<T>(s, t, layout, differentiate);
    } else {
      return run_fma<T, T>(s, t, layout, differentiate);
    }
  });
  return result_of(outcome, s);
}

// The kernels leave the 2 of the derivative out.
template <typename W, typename T>
void expect_l1(const Result& result, const Map& s, const Map& t, bool differentiate) {
  const Expected expected = expect_l1(s, t, kEntryError<W>);
  const double entries = static_cast<double>(s.pixels) * (s.pixels - 1);
  for (int64_t b = 0; b < s.images; ++b)
    EXPECT_NEAR(result.values[b], expected.values[b], entries * kEntryError<W>) << "image " << b;
  if (!differentiate) return;
  // The terms are a_j, which tensor cores take rounded to half precision (once each), and are added in W;
  // those of S_ij that rounding may turn have either sign.
  const double each = kHalf<T> ? rounding<T>() : 0;
  const double steps = s.pixels * rounding<W>() + 4 * rounding<W>();
  for (size_t i = 0; i < s.at.size(); ++i) {
    ASSERT_NEAR(2 * result.grad_unit.at[i], expected.gradient.at[i],
                expected.terms.at[i] * (each + steps) + expected.unsure.at[i])
        << i;
  }
}

template <typename T>
class FeatureAffinityKernels : public ::testing::Test {};
TYPED_TEST_SUITE(FeatureAffinityKernels, FeatureTypes);

TYPED_TEST(FeatureAffinityKernels, ValueAndGradientOfEveryShapeAndLayout) {
  using T = TypeParam;
  unsigned seed = 1;
  for (const Shape& shape : kShapes) {
    const Map s = random_features<T>(shape.images, shape.student, shape.pixels, ++seed);
    const Map t = random_features<T>(shape.images, shape.teacher, shape.pixels, ++seed);
    const Layout& layout = kLayouts[seed / 2 % kLayouts.size()];
    SCOPED_TRACE(shape.name() + ", " + layout.name);
    for (const bool differentiate : {true, false}) {
      const Result result = run<T>(s, t, layout, differentiate);
      expect_l1<Wide<T>, T>(result, s, t, differentiate);
      if (differentiate) expect_backward<Wide<T>, T>(s, result.grad_unit, result.grad_features);
    }
  }
}

TYPED_TEST(FeatureAffinityKernels, LayoutsGiveTheSameBits) {
  using T = TypeParam;
  const Map s = random_features<T>(2, 37, 45, 1), t = random_features<T>(2, 9, 45, 2);
  const Result first = run<T>(s, t, kLayouts[0]);
  for (const Layout& layout : kLayouts) {
    const Result result = run<T>(s, t, layout);
    EXPECT_TRUE(same_bits(result.values, first.values)) << layout.name;
    EXPECT_TRUE(same_bits(result.grad_features.at, first.grad_features.at)) << layout.name;
  }
}

// Half precision beside float32: columns in float.
TEST(FeatureAffinityMixed, HalfPrecisionFeaturesInFloatColumns) {
  const Map s = random_features<__half>(2, 21, 70, 1), t = random_features<__half>(2, 16, 70, 2);
  for (const bool differentiate : {true, false}) {
    const auto outcome =
        in_every_world([&] { return run_fma<float, __half>(s, t, kLayouts[1], differentiate); });
    const Result result = result_of(outcome, s);
    expect_l1<float, float>(result, s, t, differentiate);
    if (differentiate) expect_backward<float, __half>(s, result.grad_unit, result.grad_features);
  }
}

TYPED_TEST(FeatureAffinityKernels, NothingIsLeftWhereStudentAndTeacherAreEqual) {
  using T = TypeParam;
  for (const int64_t channels : {5, 40, 100}) {
    const Map f = random_features<T>(2, channels, 70, 3);
    for (const bool differentiate : {true, false}) {
      const Result result = run<T>(f, f, kLayouts[0], differentiate);
      EXPECT_EQ(result.values, Doubles(2, 0));
      EXPECT_EQ(result.grad_unit.at, Doubles(differentiate ? f.at.size() : 0, 0));
    }
  }
}

TYPED_TEST(FeatureAffinityKernels, ColumnsOfZerosHaveNoGradientAndHarmNoOthers) {
  using T = TypeParam;
  Map s = random_features<T>(2, 20, 66, 4), t = random_features<T>(2, 7, 66, 5);
  for (int64_t c = 0; c < 20; ++c) s(0, c, 0) = s(0, c, 65) = s(1, c, 9) = 0;
  for (int64_t c = 0; c < 7; ++c) t(0, c, 0) = t(1, c, 30) = 0;
  const Result result = run<T>(s, t, kLayouts[0]);
  expect_l1<Wide<T>, T>(result, s, t, true);
  expect_backward<Wide<T>, T>(s, result.grad_unit, result.grad_features);
  for (int64_t c = 0; c < 20; ++c) {
    EXPECT_NE(result.grad_unit(0, c, 65), 0) << "the test asks nothing";
    EXPECT_EQ(result.grad_features(0, c, 0), 0);
    EXPECT_EQ(result.grad_features(0, c, 65), 0);
    EXPECT_EQ(result.grad_features(1, c, 9), 0);
  }
}

// A NaN or infinite feature governs every S_ij of its pixel, and so its image; no other image.
TYPED_TEST(FeatureAffinityKernels, WhatIsNotFiniteShowsInItsImage) {
  using T = TypeParam;
  const Map students = random_features<T>(3, 18, 67, 6), teachers = random_features<T>(3, 4, 67, 7);
  const Result finite = run<T>(students, teachers, kLayouts[0]);
  for (const double bad : {kNan, -kInf}) {
    for (const bool of_student : {true, false}) {
      Map s = students, t = teachers;
      (of_student ? s : t)(1, 2, 66) = bad;
      const Result value_alone = run<T>(s, t, kLayouts[0], false);
      const Result result = run<T>(s, t, kLayouts[0]);
      for (int64_t b = 0; b < 3; ++b) {
        EXPECT_EQ(std::isnan(result.values[b]), b == 1);
        EXPECT_EQ(std::isnan(value_alone.values[b]), b == 1);
        for (int64_t n = 0; n < 67; ++n) {
          for (int64_t c = 0; c < 18; ++c) {
            if (b == 1) {
              EXPECT_TRUE(std::isnan(result.grad_features(b, c, n))) << bad << ", " << c << ", " << n;
            } else {
              EXPECT_EQ(result.grad_features(b, c, n), finite.grad_features(b, c, n));
            }
          }
        }
      }
    }
  }
}

// The teacher at a relative distance, also rotated into more channels: float32 keeps the value's digits.
TEST(FeatureAffinityNear, NoDigitsAreLostCloseToTheTeacher) {
  std::mt19937 random(8);
  std::normal_distribution<double> normal;
  const int64_t channels = 48, pixels = 70;
  Map s(1, channels, pixels);
  for (double& f : s.at) f = static_cast<float>(std::max(0.0, normal(random)));
  for (const bool rotated : {false, true}) {
    for (const double distance : {1e-1, 1e-2, 1e-3, 1e-4}) {
      Map near = s;
      for (double& f : near.at) f += distance * normal(random);
      Map t(1, rotated ? 64 : channels, pixels);
      for (int64_t n = 0; n < pixels; ++n) {
        // An orthonormal map: a reflection of the column, continued by zeros, along a fixed vector.
        double along = 0;
        for (int64_t c = 0; c < channels; ++c) along += near(0, c, n) * std::cos(c) / std::sqrt(32);
        double squares = 0;
        for (int64_t c = 0; c < t.channels; ++c) squares += std::cos(c) * std::cos(c) / 32;
        for (int64_t c = 0; c < t.channels; ++c) {
          const double f = c < channels ? near(0, c, n) : 0;
          t(0, c, n) =
              static_cast<float>(rotated ? f - 2 * along / squares * std::cos(c) / std::sqrt(32) : f);
        }
      }
      SCOPED_TRACE(std::to_string(distance) + (rotated ? ", rotated" : ""));
      const Result result = run<float>(s, t, kLayouts[0]);
      const Expected expected = expect_l1(s, t, kEntryError<float>);
      EXPECT_NEAR(result.values[0], expected.values[0], 1e-4 * expected.values[0]);
      for (size_t i = 0; i < s.at.size(); ++i) {
        ASSERT_NEAR(2 * result.grad_unit.at[i], expected.gradient.at[i],
                    expected.terms.at[i] * (pixels + 4) * rounding<float>() + expected.unsure.at[i]);
      }
    }
  }
}

// However many blocks share the tiles of an image.
TEST(FeatureAffinityValue, EveryTileIsTakenOnce) {
  for (const int64_t pixels : {1, 64, 65, 129, 200, 257}) {
    const Map s = random_features<double>(2, 3, pixels, 9), t = random_features<double>(2, 2, pixels, 10);
    const Expected expected = expect_l1(s, t, 0);
    const auto rows = [&](const Map& m) {
      const Map unit = unit_of(m);
      const int64_t row = round_up(pixels, kRowMultiple);
      std::vector<double> all(m.images * m.channels * row, 0);
      for (int64_t i = 0; i < static_cast<int64_t>(unit.at.size()); ++i)
        all[i / pixels * row + i % pixels] = unit.at[i];
      return all;
    };
    for (const int64_t blocks : {1, 2, 5, 40}) {
      const auto values = in_every_world([&] {
        Buffer<double> a(rows(s)), b(rows(t)), partial(2 * blocks), values(2);
        const int64_t row = round_up(pixels, kRowMultiple);
        const FmaTiles<double> tiles{{a.data(), 3, row, 3 * row}, {b.data(), 2, row, 2 * row}, {}, pixels};
        expect_success(launch(affinity_value_kernel<FmaTiles<double>>, static_cast<unsigned>(2 * blocks),
                              nullptr, tiles, blocks, partial.data()));
        expect_success(
            launch(affinity_sum_kernel<double>, 2, nullptr, partial.data(), blocks, values.data()));
        return values.contents();
      });
      for (int64_t b = 0; b < 2; ++b)
        EXPECT_NEAR(values[b], expected.values[b], 1e-13 * expected.values[b]) << pixels << ", " << blocks;
    }
  }
}

TEST(FeatureAffinityValue, PartialSumsAreFew) {
  EXPECT_EQ(affinity_partials(1, 64, false), 1);
  EXPECT_EQ(affinity_partials(8, 3136, true), 49);
  for (const int64_t images : {1, 7, 100, 5000}) {
    const int64_t all = images * affinity_partials(images, 1 << 20, false);
    EXPECT_LE(all, std::max(kMaxBlocks, images));
    EXPECT_GT(all, std::max(kMaxBlocks - images, images - 1));
  }
}

// The largest and the smallest features that are not 0: no square of one overflows or vanishes.
TYPED_TEST(FeatureAffinityKernels, TheSizeOfFeaturesDoesNotMatter) {
  using T = TypeParam;
  const auto sizes =
      std::is_same_v<T, __half> ? Doubles{1e-7, 1e-5, 1e2, 5e3} : Doubles{1e-37, 1e-30, 1e30, 1e37};
  Map s(1, 20, 8), t = random_features<T>(1, 5, 8, 13);
  for (int64_t n = 0; n < 8; ++n) {
    for (int64_t c = 0; c < 20; ++c)
      s(0, c, n) = static_cast<Wide<T>>(
          static_cast<T>(static_cast<Wide<T>>(sizes[n % sizes.size()] * (1 + (c * 7 + n) % 11))));
  }
  const Result result = run<T>(s, t, kLayouts[0]);
  expect_l1<Wide<T>, T>(result, s, t, true);
}

// Images whose matrices are more than 2^31 elements apart.
TEST(FeatureAffinityBig, OffsetsOfImagesHave64Bits) {
  constexpr int64_t kFar = (int64_t{1} << 31) + 64;
  const Map s = random_features<float>(2, 3, 4, 18), t = random_features<float>(2, 2, 4, 19);
  FarBuffer<float> a(kFar + 64), b(kFar + 64), grad(kFar + 64);
  const auto fill = [](FarBuffer<float>& to, const Map& m) {
    const Map unit = unit_of(m);
    for (int64_t i = 0; i < static_cast<int64_t>(unit.at.size()); ++i)
      to.set(i / (m.channels * 4) * kFar + i % (m.channels * 4), static_cast<float>(unit.at[i]));
  };
  fill(a, s);
  fill(b, t);
  Buffer<double> partial(2), values(2);
  const FmaTiles<float> tiles{{a.data(), 3, 4, kFar}, {b.data(), 2, 4, kFar}, {grad.data(), 3, 4, kFar}, 4};
  expect_success(launch_l1_affinity(tiles, 2, true, partial.data(), values.data(), nullptr));
  Result result{values.contents(), s, s};
  for (int64_t i = 0; i < 24; ++i) result.grad_unit.at[i] = grad.at(i / 12 * kFar + i % 12);
  expect_l1<float, float>(result, s, t, true);
}

}  // namespace
}  // namespace torchqat::cuda::testing
