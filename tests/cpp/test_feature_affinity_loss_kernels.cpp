#include <sys/mman.h>

#include <array>
#include <cmath>
#include <functional>
#include <random>
#include <string>

#include "feature_affinity_loss.cuh"
#include "kernel_test.h"

// The kernels of feature_affinity_loss, in the order in which feature_affinity_loss.cu launches them, against
// S written out in full, in double.
namespace torchqat::cuda::testing {
namespace {

using Doubles = std::vector<double>;

constexpr double kEps = 1e-5;
constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

template <typename T>
constexpr bool kHalf = sizeof(T) == 2;
// What the kernels compute with.
template <typename T>
using Wide = opmath_t<T>;
// Half a unit in the last place of 1.
template <typename T>
double rounding() {
  return std::is_same_v<T, double>   ? std::ldexp(1, -53)
         : std::is_same_v<T, float>  ? std::ldexp(1, -24)
         : std::is_same_v<T, __half> ? std::ldexp(1, -11)
                                     : std::ldexp(1, -8);
}

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

// --------------------------------------------------------------------------------------------- the reference

// (images, channels, pixels), row after row.
struct Map {
  int64_t images, channels, pixels;
  Doubles at;

  Map(int64_t b, int64_t c, int64_t n) : images(b), channels(c), pixels(n), at(b * c * n, 0.0) {}
  double& operator()(int64_t b, int64_t c, int64_t n) { return at[(b * channels + c) * pixels + n]; }
  double operator()(int64_t b, int64_t c, int64_t n) const { return at[(b * channels + c) * pixels + n]; }
};

double norm_of(const Map& f, int64_t b, int64_t n) {
  double largest = 0, sum = 0;
  for (int64_t c = 0; c < f.channels; ++c) largest = std::max(largest, std::abs(f(b, c, n)));
  if (largest == 0) return 0;
  for (int64_t c = 0; c < f.channels; ++c) sum += std::pow(f(b, c, n) / largest, 2);
  return largest * std::sqrt(sum);
}

Map unit_of(const Map& f) {
  Map unit(f.images, f.channels, f.pixels);
  for (int64_t b = 0; b < f.images; ++b) {
    for (int64_t n = 0; n < f.pixels; ++n) {
      const double norm = norm_of(f, b, n);
      for (int64_t c = 0; c < f.channels; ++c) unit(b, c, n) = norm == 0 ? 0 : f(b, c, n) / (norm + kEps);
    }
  }
  return unit;
}

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

// The gradient in the features from that in their unit columns: a = f / (n + eps), dn/df = f / n.
Map expect_features_gradient(const Map& f, const Map& grad) {
  Map result(f.images, f.channels, f.pixels);
  for (int64_t b = 0; b < f.images; ++b) {
    for (int64_t n = 0; n < f.pixels; ++n) {
      const double norm = norm_of(f, b, n);
      if (norm == 0) continue;
      double along = 0;
      for (int64_t c = 0; c < f.channels; ++c) along += f(b, c, n) / norm * grad(b, c, n);
      for (int64_t c = 0; c < f.channels; ++c) {
        result(b, c, n) =
            grad(b, c, n) / (norm + kEps) - f(b, c, n) / (norm + kEps) * (along / (norm + kEps));
      }
    }
  }
  return result;
}

// ---------------------------------------------------------------------------------------------------- memory

// Strides of image, channel and pixel.
using Strides = std::array<int64_t, 3>;
struct Layout {
  const char* name;
  std::function<Strides(const Map&)> strides;
};
const std::vector<Layout> kLayouts = {{"contiguous",
                                       [](const Map& m) {
                                         return Strides{m.channels * m.pixels, m.pixels, 1};
                                       }},
                                      {"channels last",
                                       [](const Map& m) {
                                         return Strides{m.channels * m.pixels, 1, m.channels};
                                       }},
                                      {"sliced",
                                       [](const Map& m) {
                                         return Strides{m.channels * (2 * m.pixels + 3), 2 * m.pixels + 3, 2};
                                       }},
                                      {"transposed", [](const Map& m) {
                                         return Strides{1, m.images * m.pixels, m.images};
                                       }}};

int64_t extent(const Map& map, const Strides& s) {
  return (map.images - 1) * s[0] + (map.channels - 1) * s[1] + (map.pixels - 1) * s[2] + 1;
}
template <typename T>
Features<T> features_at(T* data, const Map& map, const Strides& s) {
  return {data, map.channels, map.pixels, s[0], s[1], s[2]};
}

// What lies between the features is NaN: nobody may read it.
template <typename T>
std::vector<T> laid_out(const Map& map, const Strides& s) {
  std::vector<T> memory(extent(map, s), static_cast<T>(kNan));
  for (int64_t b = 0; b < map.images; ++b) {
    for (int64_t c = 0; c < map.channels; ++c) {
      for (int64_t n = 0; n < map.pixels; ++n)
        memory[b * s[0] + c * s[1] + n * s[2]] = static_cast<T>(static_cast<Wide<T>>(map(b, c, n)));
    }
  }
  return memory;
}

// The elements of a map; what lies between them must still be what it was.
template <typename T>
Map read_map(const std::vector<T>& memory, Map map, const Strides& s, T between) {
  std::vector<T> rest = memory;
  for (int64_t b = 0; b < map.images; ++b) {
    for (int64_t c = 0; c < map.channels; ++c) {
      for (int64_t n = 0; n < map.pixels; ++n) {
        T& element = rest[b * s[0] + c * s[1] + n * s[2]];
        map(b, c, n) = static_cast<Wide<T>>(element);
        element = between;
      }
    }
  }
  for (const T& element : rest) EXPECT_TRUE(same_bits(element, between)) << "written between the elements";
  return map;
}

// Features as after a ReLU, to the precision of T: about a third of them 0, norms from 1e-3 to 1e3.
template <typename T>
Map random_features(int64_t images, int64_t channels, int64_t pixels, unsigned seed) {
  std::mt19937 random(seed);
  const auto uniform = [&] { return static_cast<double>(random() % 65536) / 65536; };
  Map map(images, channels, pixels);
  for (int64_t b = 0; b < images; ++b) {
    for (int64_t n = 0; n < pixels; ++n) {
      const double size = std::pow(10, 6 * uniform() - 3);
      for (int64_t c = 0; c < channels; ++c) {
        const double f = std::max(0.0, 1.5 * uniform() - 0.5);
        map(b, c, n) = static_cast<Wide<T>>(static_cast<T>(static_cast<Wide<T>>(size * f)));
      }
    }
  }
  return map;
}

// ------------------------------------------------------------------------------------------------ the
// kernels

// The bits of a map, so that worlds can be compared.
using Outcome = std::tuple<Doubles, Doubles, Doubles>;

// The values of the images, and if asked for the gradient in the unit columns and in the features.
struct Result {
  Doubles values;
  Map grad_unit, grad_features;
};

constexpr double kFactor = 0.5;  // of the gradient in the features

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

  const auto between = static_cast<scalar_t>(7.0F);
  Buffer<scalar_t> out(std::vector<scalar_t>(student.size(), between));
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

  const auto between = static_cast<half_t>(7.0F);
  Buffer<half_t> out(std::vector<half_t>(student.size(), between));
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

template <typename T>
Result run(const Map& s, const Map& t, const Layout& layout, bool differentiate = true) {
  const auto outcome = in_every_world([&] {
    if constexpr (kHalf<T>) {
      return run_tensor<T>(s, t, layout, differentiate);
    } else {
      return run_fma<T, T>(s, t, layout, differentiate);
    }
  });
  Result result{std::get<0>(outcome), s, s};
  result.grad_unit.at = std::get<1>(outcome);
  result.grad_features.at = std::get<2>(outcome);
  return result;
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

// The gradient in the features, from the one in unit columns that the kernels had.
template <typename W, typename T>
void expect_backward(const Result& result, const Map& s) {
  const Map expected = expect_features_gradient(s, result.grad_unit);
  for (int64_t b = 0; b < s.images; ++b) {
    for (int64_t n = 0; n < s.pixels; ++n) {
      double largest = 0;  // of the terms; W's rounding of the norm and of the terms, T's of the result
      for (int64_t c = 0; c < s.channels; ++c) {
        const double norm = norm_of(s, b, n);
        if (norm != 0) largest = std::max(largest, std::abs(result.grad_unit(b, c, n)) / (norm + kEps));
      }
      for (int64_t c = 0; c < s.channels; ++c) {
        const double value = kFactor * expected(b, c, n);
        const double smallest = kHalf<T> ? std::ldexp(1, -25) : 0;  // half of float16's subnormal step
        ASSERT_NEAR(
            result.grad_features(b, c, n), value,
            rounding<T>() * std::abs(value) + 8 * rounding<W>() * std::sqrt(s.channels) * largest + smallest)
            << b << ", " << c << ", " << n;
      }
    }
  }
}

template <typename T>
class FeatureAffinityKernels : public ::testing::Test {};
TYPED_TEST_SUITE(FeatureAffinityKernels, StorageTypes);

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
      if (differentiate) expect_backward<Wide<T>, T>(result, s);
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

}  // namespace
}  // namespace torchqat::cuda::testing
