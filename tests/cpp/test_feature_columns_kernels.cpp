#include <cmath>
#include <random>
#include <string>

#include "feature_columns.cuh"
#include "feature_maps.h"
#include "kernel_test.h"
#include "scaled_columns.cuh"

// The kernels between features and unit columns, against the definitions in double.
namespace torchqat::cuda::testing {
namespace {

template <typename T>
class FeatureColumns : public ::testing::Test {};
TYPED_TEST_SUITE(FeatureColumns, FeatureTypes);

// Stacked, the student's rows above the teacher's, in double, as the matrix products take them.
TYPED_TEST(FeatureColumns, UnitColumnsInDoubleStacked) {
  using T = TypeParam;
  for (const int64_t pixels : {1, 31, 32, 33, 100}) {
    Map s = random_features<T>(2, 35, pixels, 11);
    const Map t = random_features<T>(2, 6, pixels, 12);
    for (int64_t c = 0; c < 35; ++c) s(1, c, pixels / 2) = 0;
    for (const Layout& layout : kLayouts) {
      SCOPED_TRACE(std::to_string(pixels) + " pixels, " + layout.name);
      const auto [stacked, norms] = in_every_world([&] {
        Buffer<T> student(laid_out<T>(s, layout.strides(s))), teacher(laid_out<T>(t, layout.strides(t)));
        Buffer<double> unit(2 * 41 * pixels), norms(2 * pixels);
        const UnitColumns<double> a{unit.data(), 35, pixels, 41 * pixels};
        const UnitColumns<double> b{unit.data() + 35 * pixels, 6, pixels, 41 * pixels};
        expect_success(launch_unit_columns(features_at<const T>(student.data(), s, layout.strides(s)), 2,
                                           kEps, a, norms.data(), nullptr));
        expect_success(launch_unit_columns(features_at<const T>(teacher.data(), t, layout.strides(t)), 2,
                                           kEps, b, static_cast<double*>(nullptr), nullptr));
        return std::tuple(unit.contents(), norms.contents());
      });
      const Map a = unit_of(s), b = unit_of(t);
      for (int64_t image = 0; image < 2; ++image) {
        for (int64_t n = 0; n < pixels; ++n) {
          EXPECT_NEAR(norms[image * pixels + n], norm_of(s, image, n), 1e-14 * norm_of(s, image, n));
          for (int64_t c = 0; c < 41; ++c) {
            const double expected = c < 35 ? a(image, c, n) : b(image, c - 35, n);
            EXPECT_NEAR(stacked[(image * 41 + c) * pixels + n], expected, 1e-14 * std::abs(expected));
          }
        }
      }
    }
  }
}

// Features times a power of two, to the bit; and a scale that makes the unit column of them.
template <typename half_t>
void expect_scaled_columns() {
  for (const auto& size : {std::pair(1, 1), std::pair(3, 17), std::pair(32, 32), std::pair(50, 33)}) {
    const int64_t channels = size.first, pixels = size.second;
    Map f = random_features<half_t>(2, channels, pixels, 14);
    for (int64_t c = 0; c < channels; ++c) f(1, c, pixels - 1) = 0;
    const int64_t row = round_up(channels, 16), rows = round_up(pixels, 16);
    for (const Layout& layout : kLayouts) {
      const auto [scaled, scales, norms] = in_every_world([&] {
        Buffer<half_t> features(laid_out<half_t>(f, layout.strides(f))), scaled(2 * rows * row);
        Buffer<float> scales(2 * rows), norms(2 * pixels);
        expect_success(launch_scaled_columns(
            features_at<const half_t>(features.data(), f, layout.strides(f)), 2, kEps,
            ScaledColumns<half_t>{scaled.data(), scales.data(), row, rows}, norms.data(), nullptr));
        return std::tuple(scaled.contents(), scales.contents(), norms.contents());
      });
      for (int64_t i = 0; i < 2 * rows; ++i) {
        const int64_t image = i / rows, n = i % rows;
        const double norm = n < pixels ? norm_of(f, image, n) : 0;
        EXPECT_NEAR(n < pixels ? norms[image * pixels + n] : 0, norm, 1e-7 * norm);
        EXPECT_EQ(scales[i] == 0, norm == 0);
        double squares = 0;
        for (int64_t c = 0; c < row; ++c) {
          const double u = static_cast<float>(scaled[i * row + c]);
          squares += u * u;
          if (n >= pixels || c >= channels || f(image, c, n) == 0) {
            EXPECT_EQ(u, 0);
          } else {
            const double ratio = u / f(image, c, n);
            EXPECT_EQ(std::exp2(std::round(std::log2(ratio))), ratio) << "no power of two";
            const double unit = f(image, c, n) / (norm + kEps);
            EXPECT_NEAR(u * scales[i], unit, 1e-7 * unit);
          }
        }
        if (norm != 0) {
          EXPECT_GE(std::sqrt(squares), std::exp2(kScaledExponent<half_t>));
          EXPECT_LT(std::sqrt(squares), std::exp2(kScaledExponent<half_t> + 1));
        }
      }
    }
  }
}
TEST(FeatureColumnsScaled, LosesNothing) {
  expect_scaled_columns<__half>();
  expect_scaled_columns<__nv_bfloat16>();
}

// The gradient of the columns has an order of its own.
TYPED_TEST(FeatureColumns, BackwardOfGradientsInAnyOrder) {
  using T = TypeParam;
  using W = Wide<T>;
  Map f = random_features<T>(2, 37, 41, 15);
  for (int64_t c = 0; c < 37; ++c) f(0, c, 40) = 0;
  Map grad(2, 37, 41), norms(2, 1, 41);
  std::mt19937 random(16);
  for (double& g : grad.at) g = static_cast<W>(static_cast<double>(random() % 2001) / 1000 - 1);
  for (int64_t i = 0; i < 82; ++i) norms.at[i] = static_cast<W>(norm_of(f, i / 41, i % 41));
  for (const Layout& of_grad : kLayouts) {
    for (const Layout& layout : kLayouts) {
      SCOPED_TRACE(std::string(layout.name) + " from " + of_grad.name);
      const Wide<T> between = 7;
      const auto out = in_every_world([&] {
        Buffer<W> grads(laid_out<W>(grad, of_grad.strides(grad)));
        Buffer<W> lengths(laid_out<W>(norms, {41, 41, 1}));
        Buffer<T> features(laid_out<T>(f, kLayouts[1].strides(f)));
        Buffer<Wide<T>> out(std::vector<Wide<T>>(extent(f, layout.strides(f)), between));
        expect_success(launch_unit_columns_backward(
            features_at<const W>(grads.data(), grad, of_grad.strides(grad)),
            features_at<const T>(features.data(), f, kLayouts[1].strides(f)), 2, lengths.data(), kEps,
            kFactor, features_at(out.data(), f, layout.strides(f)), nullptr));
        return out.contents();
      });
      expect_backward<W, T>(f, grad, read_map(out, f, layout.strides(f), between));
    }
  }
}

// Without eps their length is 0 as well.
TYPED_TEST(FeatureColumns, ColumnsOfZerosStayZerosWithoutEps) {
  using T = TypeParam;
  const Map f(1, 3, 5);
  const auto all = in_every_world([&] {
    Buffer<T> features(laid_out<T>(f, {15, 5, 1}));
    Buffer<Wide<T>> unit(15), norms(5), grad_features(15), grads(std::vector<Wide<T>>(15, 1));
    const auto from = features_at<const T>(features.data(), f, {15, 5, 1});
    expect_success(
        launch_unit_columns(from, 1, 0, UnitColumns<Wide<T>>{unit.data(), 3, 5, 15}, norms.data(), nullptr));
    expect_success(launch_unit_columns_backward(features_at<const Wide<T>>(grads.data(), f, {15, 5, 1}), from,
                                                1, norms.data(), 0, 1,
                                                features_at(grad_features.data(), f, {15, 5, 1}), nullptr));
    std::vector<double> out;
    for (const auto& v : unit.contents()) out.push_back(v);
    for (const auto& v : grad_features.contents()) out.push_back(v);
    if constexpr (kHalf<T>) {
      Buffer<T> scaled(16 * 16);
      Buffer<float> scales(16);
      expect_success(launch_scaled_columns(from, 1, 0, ScaledColumns<T>{scaled.data(), scales.data(), 16, 16},
                                           nullptr, nullptr));
      for (const auto& v : scaled.contents()) out.push_back(static_cast<float>(v));
      for (const float v : scales.contents()) out.push_back(v);
    }
    return out;
  });
  EXPECT_EQ(all, Doubles(all.size(), 0));
}

// Features that are more than 2^31 elements apart, along each dimension in turn.
TEST(FeatureColumnsBig, OffsetsHave64Bits) {
  using T = __nv_bfloat16;
  constexpr int64_t kFar = (int64_t{1} << 31) + 64;
  const Map f = random_features<T>(2, 2, 2, 17), unit = unit_of(f);
  const Strides dense{4, 2, 1};
  Map grad(2, 2, 2), out = f;
  for (int64_t i = 0; i < 8; ++i) grad.at[i] = static_cast<double>(i + 1);
  for (const Strides& far : {Strides{kFar, 2, 1}, Strides{2, kFar, 1}, Strides{2, 1, kFar}}) {
    FarBuffer<T> features(kFar + 64), grad_features(kFar + 64);
    FarBuffer<float> columns(kFar + 64);
    Buffer<float> norms(4), grads(laid_out<float>(grad, dense));
    const auto place = [&](int64_t i) { return i / 4 * far[0] + i / 2 % 2 * far[1] + i % 2 * far[2]; };
    for (int64_t i = 0; i < 8; ++i) features.set(place(i), static_cast<T>(static_cast<float>(f.at[i])));
    const auto from = features_at<const T>(features.data(), f, far);
    const UnitColumns<float> to{columns.data(), 2, 2, kFar};
    expect_success(launch_unit_columns(from, 2, kEps, to, norms.data(), nullptr));
    expect_success(launch_unit_columns_backward(features_at<const float>(grads.data(), grad, dense), from, 2,
                                                norms.data(), kEps, kFactor,
                                                features_at(grad_features.data(), f, far), nullptr));
    for (int64_t i = 0; i < 8; ++i) {
      EXPECT_NEAR(columns.at(i / 4 * kFar + i % 4), unit.at[i], 1e-7);
      out.at[i] = static_cast<float>(grad_features.at(place(i)));
    }
    expect_backward<float, T>(f, grad, out);
  }
}

}  // namespace
}  // namespace torchqat::cuda::testing
