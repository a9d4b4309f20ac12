#include <cmath>
#include <random>
#include <string>

#include "kernel_test.h"
#include "staircase_relu.cuh"

// The kernels of staircase_relu. Elementwise results are those of a loop over math/, to the bit. Gradients
// are multiples of 1/8 and derivatives in alpha are integers, so that sums are exact and must be equal,
// whatever their order: an element left out or counted twice shows.
namespace torchqat::cuda::testing {
namespace {

using math::AlphaSlope;
using math::ChannelView;
using math::Region;
using math::Staircase;

struct Shape {
  ChannelView view;
  int64_t n;
  std::string name() const {
    return std::to_string(view.channels) + " channels, inner " + std::to_string(view.inner) + ", n " +
           std::to_string(n);
  }
};

Shape per_tensor(int64_t n) { return {{1, n}, n}; }
Shape channels_first(int64_t batch, int64_t channels, int64_t inner) {
  return {{channels, inner}, batch * channels * inner};
}
Shape channels_last(int64_t rows, int64_t channels) { return {{channels, 1}, rows * channels}; }

// Around a pack, a warp, a block; around the slices that a block takes in the backward pass; runs of a
// channel that are and are not whole packs; channels that do and do not fill 32 columns.
std::vector<Shape> shapes() {
  std::vector<Shape> all;
  for (const int64_t n : kSizes) all.push_back(per_tensor(n));
  for (const int64_t n : {kSlice - 1, kSlice, kSlice + 1, 2 * kSlice + 9}) all.push_back(per_tensor(n));
  for (const int64_t inner : {2, 7, 8, 9, 49, 256}) all.push_back(channels_first(3, 5, inner));
  all.push_back(channels_first(1, 2, kSlice));
  all.push_back(channels_first(3, 1, 5));
  all.push_back(channels_first(2, 3, kSlice / 2 + 8));
  all.push_back(channels_first(2, 3, kSlice / 2 + 1));
  for (const int64_t channels : {2, 31, 32, 33, 65}) all.push_back(channels_last(19, channels));
  for (const int64_t rows : {int64_t{1}, kSliceRows - 1, kSliceRows, kSliceRows + 1}) {
    all.push_back(channels_last(rows, 3));
  }
  all.push_back(channels_last(2 * kSliceRows + 5, 33));
  return all;
}

template <typename T>
std::vector<opmath_t<T>> step_sizes(int64_t channels) {
  std::vector<opmath_t<T>> alpha(channels);
  for (int64_t c = 0; c < channels; ++c) alpha[c] = opmath_t<T>(0.1) * opmath_t<T>(1 + c % 11);
  return alpha;
}

// Below 0, on and between the steps of their channel, above the last one.
template <typename T>
std::vector<T> activations(const Shape& shape, int bits) {
  const auto alpha = step_sizes<T>(shape.view.channels);
  const int top = math::staircase_top(bits);
  std::mt19937 random(static_cast<unsigned>(shape.n));
  std::vector<T> x(shape.n);
  for (int64_t p = 0; p < shape.n; ++p) {
    const auto step = alpha[shape.view.channel_at(p)];
    const unsigned kind = random() % 8;
    const auto share = static_cast<opmath_t<T>>(random() % 1024) / 1024;
    const auto on_step = step * static_cast<opmath_t<T>>(random() % (top + 2));
    x[p] = static_cast<T>(kind == 0   ? -share
                          : kind == 1 ? opmath_t<T>(-0.0)
                          : kind < 4  ? on_step
                                      : share * step * static_cast<opmath_t<T>>(top + 1));
  }
  return x;
}

template <typename T>
std::vector<T> upstream(int64_t n) {
  std::mt19937 random(7);
  std::vector<T> grad(n);
  for (auto& g : grad) g = static_cast<T>(static_cast<float>(random() % 17) / 8 - 1);
  return grad;
}

// What is kept in so many bits for each element: regions (2) or states.
template <typename T>
std::vector<uint8_t> kept_codes(const Shape& shape, const std::vector<T>& x,
                                const std::vector<opmath_t<T>>& alpha, int bits, int kept_bits) {
  std::vector<uint8_t> kept(math::code_bytes(shape.n, kept_bits), 0);
  math::with_code_bits(kept_bits, [&](auto width) {
    for (int64_t p = 0; p < shape.n; ++p) {
      const Staircase<opmath_t<T>> stair(alpha[shape.view.channel_at(p)], bits);
      const auto v = static_cast<opmath_t<T>>(x[p]);
      const auto code =
          width == 2 ? static_cast<unsigned>(stair.region(v)) : static_cast<unsigned>(stair.state(v));
      math::put_code<width>(&kept[p / 8 * width], static_cast<int>(p % 8), code);
    }
  });
  return kept;
}

template <typename T>
class StaircaseReluKernels : public ::testing::Test {};
TYPED_TEST_SUITE(StaircaseReluKernels, StorageTypes);

// ------------------------------------------------------------------------------------------------ forward

// y, step indices, regions, states and y from the states; `blocks` 0 leaves the grid to the launch function.
template <typename T>
auto run_forward(const Shape& shape, const std::vector<T>& values, const std::vector<opmath_t<T>>& step,
                 int bits, int64_t shift_x, int64_t shift_y, unsigned blocks = 0) {
  return in_every_world([&] {
    Buffer<T> x(values, shift_x), y(shape.n, shift_y), y_alone(shape.n, shift_y), y_again(shape.n, shift_y);
    Buffer<opmath_t<T>> alpha(step);
    Buffer<uint8_t> indices(shape.n, shift_y);
    Buffer<uint8_t> regions(math::code_bytes(shape.n, 2));
    Buffer<uint8_t> states(math::code_bytes(shape.n, math::state_bits(bits)));
    const StepSizes<opmath_t<T>> steps{alpha.data(), shape.view, bits};
    const auto start = [&](auto kept_bits, auto* out, uint8_t* kept) {
      using out_t = std::remove_pointer_t<decltype(out)>;
      if (blocks == 0) {
        return launch_staircase_relu<kept_bits>(x.data(), out, kept, steps, shape.n, nullptr);
      }
      return launch(staircase_relu_kernel<kept_bits, T, opmath_t<T>, out_t>, blocks, nullptr, x.data(), out,
                    kept, steps, shape.n, pack_aligned<kGroup>(x.data(), out));
    };
    const std::integral_constant<int, 0> nothing;
    expect_success(start(std::integral_constant<int, 2>(), y.data(), regions.data()));
    expect_success(start(nothing, y_alone.data(), nullptr));
    expect_success(start(nothing, indices.data(), nullptr));
    EXPECT_TRUE(same_bits(y.contents(), y_alone.contents()));
    math::with_code_bits(math::state_bits(bits), [&](auto width) {
      expect_success(start(width, y_alone.data(), states.data()));
      if (blocks == 0) {
        expect_success(
            launch_staircase_relu_rebuild<width>(states.data(), y_again.data(), steps, shape.n, nullptr));
      } else {
        expect_success(launch(staircase_relu_rebuild_kernel<width, T, opmath_t<T>>, blocks, nullptr,
                              states.data(), y_again.data(), steps, shape.n,
                              pack_aligned<kGroup>(y_again.data())));
      }
    });
    EXPECT_TRUE(same_bits(y.contents(), y_alone.contents()));
    return std::tuple(y.contents(), indices.contents(), regions.contents(), states.contents(),
                      y_again.contents());
  });
}

template <typename T, typename Result>
void expect_forward(const Result& result, const Shape& shape, const std::vector<T>& x,
                    const std::vector<opmath_t<T>>& alpha, int bits) {
  const auto& [y, indices, regions, states, y_again] = result;
  const auto same = [](T a, T b) {
    return same_bits(a, b) || (std::isnan(float(a)) && std::isnan(float(b)));
  };
  for (int64_t p = 0; p < shape.n; ++p) {
    const Staircase<opmath_t<T>> stair(alpha[shape.view.channel_at(p)], bits);
    const auto v = static_cast<opmath_t<T>>(x[p]);
    ASSERT_TRUE(same(y[p], static_cast<T>(stair(v)))) << p;
    ASSERT_TRUE(same(y[p], y_again[p])) << p;
    ASSERT_EQ(indices[p], stair.code(v)) << p;
  }
  EXPECT_EQ(regions, kept_codes(shape, x, alpha, bits, 2)) << "the bits past the last element are 0";
  EXPECT_EQ(states, kept_codes(shape, x, alpha, bits, math::state_bits(bits)));
}

TYPED_TEST(StaircaseReluKernels, ForwardOfEveryShape) {
  using T = TypeParam;
  int bits = 1;
  for (const Shape& shape : shapes()) {
    SCOPED_TRACE(shape.name());
    const auto x = activations<T>(shape, bits);
    const auto alpha = step_sizes<T>(shape.view.channels);
    expect_forward(run_forward(shape, x, alpha, bits, 0, 0), shape, x, alpha, bits);
    bits = bits % 8 + 1;
  }
}

TYPED_TEST(StaircaseReluKernels, ForwardOfUnalignedPointers) {
  using T = TypeParam;
  for (const Shape& shape : {per_tensor(5003), channels_first(3, 5, 8), channels_last(19, 33)}) {
    const auto x = activations<T>(shape, 2);
    const auto alpha = step_sizes<T>(shape.view.channels);
    for (const auto& [shift_x, shift_y] : {std::pair(1, 0), std::pair(0, 1), std::pair(3, 5)}) {
      SCOPED_TRACE(shape.name());
      expect_forward(run_forward(shape, x, alpha, 2, shift_x, shift_y), shape, x, alpha, 2);
    }
  }
}

TYPED_TEST(StaircaseReluKernels, ForwardOfMoreElementsThanTheGridHasThreads) {
  using T = TypeParam;
  for (const Shape& shape : {per_tensor(5003), channels_first(3, 5, 333), channels_last(151, 33)}) {
    const auto x = activations<T>(shape, 4);
    const auto alpha = step_sizes<T>(shape.view.channels);
    expect_forward(run_forward(shape, x, alpha, 4, 0, 0, 1), shape, x, alpha, 4);
  }
}

TYPED_TEST(StaircaseReluKernels, ForwardOfWhatIsNotANumber) {
  using T = TypeParam;
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const Shape shape = channels_last(9, 4);
  const std::vector<opmath_t<T>> alpha = {1, 0, opmath_t<T>(nan), -1};
  std::vector<T> x(shape.n);
  const float points[] = {nan, inf, -inf, 0.0F, -0.0F, 1.0F, 1.5F, -2.0F, 9.0F};
  for (int64_t p = 0; p < shape.n; ++p) x[p] = static_cast<T>(points[p / 4]);
  expect_forward(run_forward(shape, x, alpha, 2, 0, 0), shape, x, alpha, 2);
}

// ----------------------------------------------------------------------------------------------- backward

template <typename Rule>
AlphaSlope alpha_slope(int bits) {
  const int top = math::staircase_top(bits);
  return {Rule::exact, static_cast<float>(Rule::inside(top)), static_cast<float>(top)};
}

// The gradient in alpha by its definition, in double precision: the sum of grad times 0, the rule, or 2^b
// - 1.
template <typename T>
std::vector<double> reference_grad_alpha(const Shape& shape, const std::vector<T>& x,
                                         const std::vector<T>& grad, const AlphaSlope& rule, int bits) {
  const auto alpha = step_sizes<T>(shape.view.channels);
  const double top = std::pow(2.0, bits) - 1;
  std::vector<double> sums(shape.view.channels, 0);
  for (int64_t p = 0; p < shape.n; ++p) {
    const int64_t channel = p / shape.view.inner % shape.view.channels;
    const auto step = alpha[channel];
    const auto v = static_cast<opmath_t<T>>(x[p]);
    const double level = std::min(top, std::ceil(static_cast<double>(v / step)));
    const bool above = v > step * static_cast<opmath_t<T>>(top);
    const double slope = v <= 0 ? 0 : above ? top : rule.exact ? level : rule.inside;
    sums[channel] += slope * static_cast<double>(grad[p]);
  }
  return sums;
}

// To the bit; but a device's exp is not the host's.
template <typename Ste, typename T>
bool same_gradient(T a, T b) {
#ifdef __CUDACC__
  if constexpr (!math::RegionSte<Ste>) return std::abs(float(a) - float(b)) <= 1e-6F * std::abs(float(b));
#endif
  return same_bits(a, b);
}

// Launches with what `make_kept` makes of device copies of x and its codes of `kept_bits`, and compares.
template <typename Ste, typename T, typename MakeKept>
void expect_backward(const Shape& shape, const AlphaSlope& rule, int bits, int kept_bits, int64_t shift,
                     MakeKept make_kept) {
  using op_t = opmath_t<T>;
  const auto values = activations<T>(shape, bits);
  const auto step = step_sizes<T>(shape.view.channels);
  const auto grads = upstream<T>(shape.n);
  const auto kept = kept_codes(shape, values, step, bits, kept_bits);
  const auto [grad_x, grad_alpha] = in_every_world([&] {
    Buffer<T> x(values, shift), grad(grads, shift), grad_x(shape.n, shift);
    Buffer<uint8_t> codes(kept);
    Buffer<op_t> alpha(step);
    Buffer<double> partial(shape.view.channels * alpha_slices(shape.view, shape.n)),
        sums(shape.view.channels);
    const StepSizes<op_t> steps{alpha.data(), shape.view, bits};
    expect_success(launch_staircase_relu_backward(grad.data(), make_kept(x.data(), codes.data()),
                                                  grad_x.data(), sums.data(), partial.data(), steps, shape.n,
                                                  nullptr));
    return std::tuple(grad_x.contents(), sums.contents());
  });
  for (int64_t p = 0; p < shape.n; ++p) {
    const Staircase<op_t> stair(step[shape.view.channel_at(p)], bits);
    const auto d = math::ValueBackward<Ste, op_t>{rule}(static_cast<op_t>(grads[p]),
                                                        static_cast<op_t>(values[p]), stair);
    ASSERT_TRUE(same_gradient<Ste>(grad_x[p], static_cast<T>(d.x)))
        << p << ": " << float(grad_x[p]) << " for " << float(d.x);
  }
  EXPECT_EQ(grad_alpha, reference_grad_alpha(shape, values, grads, rule, bits));
}

template <typename Ste, typename T>
void expect_backward_from_x(const Shape& shape, const AlphaSlope& rule, int bits, int64_t shift = 0) {
  SCOPED_TRACE(std::string(Ste::name) + " from x, " + shape.name());
  expect_backward<Ste, T>(shape, rule, bits, 2, shift, [&](const T* x, const uint8_t*) {
    return FromX<Ste, T, opmath_t<T>>{x, {rule}};
  });
}

template <typename Ste, typename T>
void expect_backward_from_codes(const Shape& shape, const AlphaSlope& rule, int bits, int kept_bits,
                                int64_t shift = 0) {
  SCOPED_TRACE(std::string(Ste::name) + " from " + std::to_string(kept_bits) + " bits, " + shape.name());
  math::with_code_bits(kept_bits, [&](auto width) {
    expect_backward<Ste, T>(shape, rule, bits, kept_bits, shift, [&](const T*, const uint8_t* codes) {
      const auto slopes = math::region_backward<opmath_t<T>, Ste>(rule);
      return FromCodes<width, opmath_t<T>>{codes, slopes, rule.exact};
    });
  });
}

TYPED_TEST(StaircaseReluKernels, BackwardFromRegionsOfEveryShape) {
  int bits = 1;
  for (const Shape& shape : shapes()) {
    expect_backward_from_codes<math::ClippedRelu, TypeParam>(shape, alpha_slope<math::ThreeValued>(bits),
                                                             bits, 2);
    bits = bits % 4 + 1;
  }
}

TYPED_TEST(StaircaseReluKernels, BackwardFromStatesOfEveryShape) {
  int bits = 1;
  for (const Shape& shape : shapes()) {
    expect_backward_from_codes<math::ClippedRelu, TypeParam>(shape, alpha_slope<math::Exact>(bits), bits,
                                                             math::state_bits(bits));
    bits = bits % 8 + 1;
  }
}

TYPED_TEST(StaircaseReluKernels, BackwardFromXOfEveryShape) {
  int bits = 2;
  for (const Shape& shape : shapes()) {
    expect_backward_from_x<math::ClippedRelu, TypeParam>(shape, alpha_slope<math::Exact>(bits), bits);
    bits = bits % 4 + 1;
  }
}

TYPED_TEST(StaircaseReluKernels, BackwardOfUnalignedPointers) {
  for (const Shape& shape : {per_tensor(5003), channels_first(3, 5, 8), channels_first(3, 5, 49)}) {
    for (const int64_t shift : {1, 3}) {
      const auto rule = alpha_slope<math::ThreeValued>(2);
      expect_backward_from_codes<math::Relu, TypeParam>(shape, rule, 2, 2, shift);
      expect_backward_from_codes<math::Relu, TypeParam>(shape, rule, 2, 4, shift);
      expect_backward_from_x<math::ClippedRelu, TypeParam>(shape, rule, 2, shift);
    }
  }
}

// Every rule at this width.
std::vector<AlphaSlope> alpha_slopes(int bits) {
  return std::apply([&](auto... rule) { return std::vector{alpha_slope<decltype(rule)>(bits)...}; },
                    math::AlphaGradRules{});
}

template <typename Ste>
void expect_backward_of_every_rule() {
  for (const Shape& shape :
       {per_tensor(1001), channels_first(2, 3, 40), channels_first(2, 3, 7), channels_last(40, 35)}) {
    for (const int bits : {1, 2, 4}) {
      for (const AlphaSlope& rule : alpha_slopes(bits)) {
        if constexpr (math::RegionSte<Ste>) {
          if (!rule.exact || bits == 1) expect_backward_from_codes<Ste, float>(shape, rule, bits, 2);
          expect_backward_from_codes<Ste, float>(shape, rule, bits, math::state_bits(bits));
        }
        expect_backward_from_x<Ste, float>(shape, rule, bits);
      }
    }
  }
}

TEST(StaircaseReluBackward, OfEverySteAndRule) {
  std::apply([](auto... ste) { (expect_backward_of_every_rule<decltype(ste)>(), ...); },
             math::SteCatalogue{});
}

// A NaN stays in its own channel's sum and its own element of grad_x.
template <typename T, int kept_bits>
void expect_nan_kept_to_its_channel() {
  using op_t = opmath_t<T>;
  for (const Shape& shape : {channels_first(2, 3, 8), channels_first(2, 3, 5), channels_last(16, 3)}) {
    const auto step = step_sizes<T>(3);
    std::vector<T> values(shape.n, static_cast<T>(0.05F));
    const int64_t at = shape.view.position(1, 3);
    values[at] = static_cast<T>(std::numeric_limits<float>::quiet_NaN());
    const auto packed = kept_codes(shape, values, step, 2, kept_bits);
    const auto [grad_x, grad_alpha] = in_every_world([&] {
      Buffer<T> grad(std::vector<T>(shape.n, static_cast<T>(1.0F))), grad_x(shape.n);
      Buffer<uint8_t> codes(packed);
      Buffer<op_t> alpha(step);
      Buffer<double> partial(3 * alpha_slices(shape.view, shape.n)), sums(3);
      const auto slopes = math::region_backward<op_t, math::ClippedRelu>(alpha_slope<math::Min>(2));
      const FromCodes<kept_bits, op_t> kept{codes.data(), slopes, false};
      const StepSizes<op_t> steps{alpha.data(), shape.view, 2};
      expect_success(launch_staircase_relu_backward(grad.data(), kept, grad_x.data(), sums.data(),
                                                    partial.data(), steps, shape.n, nullptr));
      return std::tuple(grad_x.contents(), sums.contents());
    });
    for (int64_t p = 0; p < shape.n; ++p) EXPECT_EQ(std::isnan(float(grad_x[p])), p == at);
    for (int c = 0; c < 3; ++c) EXPECT_EQ(std::isnan(grad_alpha[c]), c == 1);
    EXPECT_EQ(grad_alpha[0], static_cast<double>(shape.n) / 3);
  }
}

TYPED_TEST(StaircaseReluKernels, BackwardKeepsNanToItsChannel) {
  expect_nan_kept_to_its_channel<TypeParam, 2>();
  expect_nan_kept_to_its_channel<TypeParam, 4>();
}

TEST(StaircaseReluBackward, AddsMoreSlicesThanABlockHasThreads) {
  for (const int64_t slices : {1, 255, 256, 257, 1000}) {
    std::vector<double> terms(3 * slices);
    std::vector<double> expected(3, 0);
    for (int64_t i = 0; i < 3 * slices; ++i)
      expected[i / slices] += terms[i] = static_cast<double>(i * 7 % 101);
    const auto sums = in_every_world([&] {
      Buffer<double> partial(terms), sums(3);
      expect_success(launch(alpha_grad_kernel<double>, 3, nullptr, partial.data(), slices, sums.data()));
      return sums.contents();
    });
    EXPECT_EQ(sums, expected);
  }
}

}  // namespace
}  // namespace torchqat::cuda::testing
