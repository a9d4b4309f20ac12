#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>

#include "bcgd_step.cuh"
#include "kernel_test.h"

// The kernels of bcgd_step_, whole steps over lists of tensors. The latents and the buffers are those of a
// loop over math/, to the bit; the scales those of sums in another order (ternary: of a sort), nearly; and
// the weights are, to the bit, what the scale that came out says.
namespace torchqat::cuda::testing {
namespace {

using math::ChannelView;
using math::Projection;
using math::StepRule;

struct Shape {
  ChannelView view;
  int64_t n;
  int64_t per_scale() const { return n / view.channels; }
};
Shape per_tensor(int64_t n) { return {{1, n}, n}; }
Shape per_channel(int64_t outer, int64_t channels, int64_t inner) {
  return {{channels, inner}, outer * channels * inner};
}

// Around a warp, a block and a slice; channels in front, in the middle and last; nothing at all.
std::vector<Shape> shapes() {
  std::vector<Shape> all{per_tensor(0)};
  for (const int64_t n : kSizes) all.push_back(per_tensor(n));
  for (const int64_t n : {kSliceElements - 1, kSliceElements, kSliceElements + 1})
    all.push_back(per_tensor(n));
  all.push_back(per_channel(1, 5, 300));
  all.push_back(per_channel(1, 2, kSliceElements + 7));
  all.push_back(per_channel(3, 4, 9));
  all.push_back(per_channel(100, 3, 50));
  all.push_back(per_channel(129, 33, 1));
  all.push_back(per_channel(0, 3, 1));
  return all;
}

template <typename T>
struct Options {
  Projection projection = Projection::mean;
  int bits = 1;
  StepRule<opmath_t<T>> rule{0.1f, 0.9f, 0.8f, 0.01f, 0.75f, 0.25f, 1, false};
  bool momentum = true;
  bool lr_on_device = false;
  float grad_scale = 0;  // 0: none
  float found_inf = -1;  // negative: none
  int unaligned = -1;    // the array that begins at its second element: w, g, y, buffer
};

// The state of one parameter on the host.
template <typename T>
struct Parameter {
  Shape shape;
  std::vector<T> w, g;
  std::vector<opmath_t<T>> y, buffer, scale;
  std::vector<float> steps{0};

  // In the order of the members, for same_bits.
  auto state() const { return std::tuple(w, y, buffer, scale, steps); }
};

template <typename T>
Parameter<T> make_parameter(const Shape& shape, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Parameter<T> p{shape, {}, {}, {}, {}, {}};
  for (int64_t i = 0; i < shape.n; ++i) {
    p.y.push_back(normal(random));
    p.w.push_back(static_cast<T>(p.y.back() < 0 ? -0.5f : 0.5f));
    p.g.push_back(static_cast<T>(normal(random)));
    p.buffer.push_back(normal(random));
  }
  p.scale.assign(shape.n == 0 && shape.view.channels == 1 ? 1 : shape.view.channels, opmath_t<T>(0.3f));
  return p;
}

template <typename T>
std::vector<Parameter<T>> make_parameters() {
  std::vector<Parameter<T>> all;
  for (const auto& shape : shapes())
    all.push_back(make_parameter<T>(shape, static_cast<unsigned>(shape.n) + 1));
  return all;
}

// ------------------------------------------------------------------------------------------ the step, run

template <typename T>
struct DeviceParameter {
  DeviceParameter(const Parameter<T>& p, int unaligned)
      : w(p.w, unaligned == 0),
        g(p.g, unaligned == 1),
        y(p.y, unaligned == 2),
        buffer(p.buffer, unaligned == 3),
        scale(p.scale),
        steps(p.steps) {}
  Buffer<T> w, g;
  Buffer<opmath_t<T>> y, buffer, scale;
  Buffer<float> steps;
};

// Each of the emulator's threads copies the batch, so most tests have a small one.
template <typename T, int kCapacity = 32>
using BatchOf = StepBatch<T, opmath_t<T>, kCapacity>;

// Launches a batch with scratch memory of its own.
template <typename T, typename Batch>
void launch_batch(const Batch& batch) {
  Buffer<math::StepSums<math::kWarmSteps>> sums(batch.slice_count());
  Buffer<opmath_t<T>> levels_at(batch.scale_count());
  Buffer<TernaryBins<opmath_t<T>>> bins(batch.large_scale_count());
  Buffer<TernaryState<opmath_t<T>>> states(batch.large_scale_count());
  expect_success(
      launch_bcgd_step(batch, {sums.data(), levels_at.data(), {bins.data(), states.data()}}, nullptr));
}

template <typename T, int kCapacity = 32>
std::vector<Parameter<T>> run_step(std::vector<Parameter<T>> parameters, const Options<T>& options) {
  Buffer<opmath_t<T>> lr(std::vector{options.rule.lr}),
      grad_scale(std::vector{opmath_t<T>(options.grad_scale)}),
      found_inf(std::vector{opmath_t<T>(options.found_inf)});
  auto batch = std::make_unique<BatchOf<T, kCapacity>>();
  batch->projection = options.projection;
  batch->bits = options.bits;
  batch->rule = options.rule;
  if (options.lr_on_device) {
    batch->rule.lr = 1;
    batch->lr = lr.data();
  }
  if (options.grad_scale != 0) batch->grad_scale = grad_scale.data();
  if (options.found_inf >= 0) batch->found_inf = found_inf.data();
  std::vector<DeviceParameter<T>> device;
  for (const auto& p : parameters) device.emplace_back(p, options.unaligned);
  for (size_t i = 0; i < parameters.size(); ++i) {
    auto& d = device[i];
    batch->append({d.w.data(), d.g.data(), d.y.data(), options.momentum ? d.buffer.data() : nullptr,
                   d.scale.data(), options.momentum ? d.steps.data() : nullptr, parameters[i].shape.view,
                   parameters[i].shape.per_scale()});
  }
  launch_batch<T>(*batch);
  for (size_t i = 0; i < parameters.size(); ++i) {
    auto& p = parameters[i];
    auto& d = device[i];
    p = {p.shape,           d.w.contents(), p.g, d.y.contents(), d.buffer.contents(), d.scale.contents(),
         d.steps.contents()};
  }
  return parameters;
}

// One step in every world.
template <typename T>
std::vector<Parameter<T>> step(const std::vector<Parameter<T>>& before, const Options<T>& options) {
  std::vector<Parameter<T>> after;
  in_every_world([&] {
    after = run_step(before, options);
    std::vector<uint8_t> bytes;
    const auto collect = [&](const auto& values) {
      const auto* begin = reinterpret_cast<const uint8_t*>(values.data());
      bytes.insert(bytes.end(), begin, begin + values.size() * sizeof(values[0]));
    };
    for (const auto& p : after) std::apply([&](const auto&... values) { (collect(values), ...); }, p.state());
    return bytes;
  });
  return after;
}

// ------------------------------------------------------------------------------------- the step, expected

template <typename T>
void update_latents(Parameter<T>& p, const Options<T>& options) {
  using opmath = opmath_t<T>;
  auto rule = options.rule;
  if (options.grad_scale != 0) rule.divisor *= options.grad_scale;
  for (int64_t i = 0; i < p.shape.n; ++i) {
    const auto w = static_cast<opmath>(p.w[i]);
    const auto g = static_cast<opmath>(p.g[i]);
    p.y[i] = options.momentum ? rule(p.y[i], w, g, p.buffer[i], p.steps[0] == 0) : rule(p.y[i], w, g);
  }
  if (options.momentum) p.steps[0] += 1;
}

template <typename T>
double fit(const std::vector<T>& values, double step, int bits, double* score = nullptr) {
  double overlap = 0;
  double energy = 0;
  for (const T y : values) {
    const double q = math::weight_level<T>(std::abs(y), static_cast<T>(step), bits);
    overlap += std::abs(y) * q;
    energy += q * q;
  }
  if (score) *score = energy > 0 ? overlap / std::sqrt(energy) : 0;
  return energy > 0 ? overlap / energy : 0;
}

template <typename T>
double sorted_ternary_scale(std::vector<T> values) {
  for (T& y : values) y = std::abs(y);
  std::sort(values.begin(), values.end(), std::greater<>());
  double sum = 0;
  double best = 0;
  double scale = 0;
  for (size_t k = 1; k <= values.size(); ++k) {
    sum += values[k - 1];
    if (sum / std::sqrt(k) > best) {
      best = sum / std::sqrt(k);
      scale = sum / k;
    }
  }
  return scale;
}

template <typename T, typename S>
double expected_scale(const std::vector<T>& values, const Options<S>& options, T before) {
  switch (options.projection) {
    case Projection::mean:
      return fit(values, 1, 1);
    case Projection::ternary:
      return sorted_ternary_scale(values);
    case Projection::lloyd:
      return fit(values, levels_at(values, options), options.bits);
    case Projection::twn: {
      std::vector<T> kept;
      const T at = levels_at(values, options);
      std::copy_if(values.begin(), values.end(), std::back_inserter(kept),
                   [&](T y) { return std::abs(y) >= at; });
      return fit(kept, 1, 1);
    }
    case Projection::warm: {
      double best = 0;
      double scale = 0;
      for (const double share : {1., 31. / 32, 33. / 32, 7. / 8, 9. / 8}) {
        double score;
        const double candidate = fit(values, static_cast<T>(before * share), options.bits, &score);
        if (score > best) {
          best = score;
          scale = candidate;
        }
      }
      return scale;
    }
  }
  return 0;
}

template <typename T>
std::vector<T> of_channel(const std::vector<T>& values, const ChannelView& view, int64_t channel) {
  std::vector<T> mine;
  for (size_t p = 0; p < values.size(); ++p) {
    if (view.channel_at(p) == channel) mine.push_back(values[p]);
  }
  return mine;
}

// What gives the weights of one scale their levels, where that is not the scale itself.
template <typename T, typename S>
T levels_at(const std::vector<T>& values, const Options<S>& options) {
  T peak = 0;
  double sum = 0;
  for (const T y : values) {
    peak = std::max(peak, std::abs(y));
    sum += std::abs(y);
  }
  const bool lloyd = options.projection == Projection::lloyd;
  return static_cast<T>(lloyd ? 2. * peak / ((1 << options.bits) - 1) : 0.7 * (sum / values.size()));
}

template <typename T, typename S>
T expected_level(T y, T at, const Options<S>& options) {
  if (options.projection != Projection::twn) return math::weight_level<T>(y, at, options.bits);
  if (std::abs(y) < at) return 0;
  return y < 0 ? T(-1) : T(1);
}

template <typename T>
void expect_step(const std::vector<Parameter<T>>& before, const Options<T>& options) {
  using opmath = opmath_t<T>;
  const double tolerance = std::is_same_v<opmath, double> ? 1e-12 : 1e-6;
  const auto after = step(before, options);
  for (size_t i = 0; i < before.size(); ++i) {
    auto p = before[i];
    SCOPED_TRACE("n " + std::to_string(p.shape.n) + ", channels " + std::to_string(p.shape.view.channels) +
                 ", inner " + std::to_string(p.shape.view.inner));
    update_latents(p, options);
    EXPECT_TRUE(same_bits(after[i].y, p.y));
    EXPECT_TRUE(same_bits(after[i].buffer, p.buffer));
    EXPECT_EQ(after[i].steps, p.steps);
    for (int64_t c = 0; c < p.shape.view.channels; ++c) {
      const auto y = of_channel(p.y, p.shape.view, c);
      const auto w = of_channel(after[i].w, p.shape.view, c);
      const opmath scale = after[i].scale[c];
      const double expected = expected_scale(y, options, p.scale[c]);
      ASSERT_NEAR(scale, expected, tolerance * expected);
      const opmath at = math::refits(options.projection) ? levels_at(y, options) : scale;
      for (size_t j = 0; j < y.size(); ++j) {
        const T expected_w = static_cast<T>(scale * expected_level(y[j], at, options));
        ASSERT_TRUE(static_cast<opmath>(expected_w) == static_cast<opmath>(w[j]))
            << float(w[j]) << " instead of " << float(expected_w) << " for " << y[j];
      }
    }
  }
}

template <typename T>
class BcgdStepKernels : public ::testing::Test {};
TYPED_TEST_SUITE(BcgdStepKernels, StorageTypes);

TYPED_TEST(BcgdStepKernels, OneBit) { expect_step(make_parameters<TypeParam>(), {}); }

TYPED_TEST(BcgdStepKernels, Ternary) {
  expect_step(make_parameters<TypeParam>(), {.projection = Projection::ternary, .bits = 2});
}

TYPED_TEST(BcgdStepKernels, MoreBits) {
  for (const int bits : {3, 4, 8}) {
    expect_step(make_parameters<TypeParam>(), {.projection = Projection::warm, .bits = bits});
  }
}

TYPED_TEST(BcgdStepKernels, OtherMethods) {
  expect_step(make_parameters<TypeParam>(), {.projection = Projection::lloyd, .bits = 4});
  expect_step(make_parameters<TypeParam>(), {.projection = Projection::twn, .bits = 2});
}

TYPED_TEST(BcgdStepKernels, Rules) {
  const auto parameters = make_parameters<TypeParam>();
  Options<TypeParam> options;
  options.momentum = false;
  expect_step(parameters, options);
  options.rule.divisor = -1;
  options.grad_scale = 3;
  options.found_inf = 0;
  options.lr_on_device = true;
  expect_step(parameters, options);
  options = {};
  options.rule.undamped = 1;
  options.rule.nesterov = true;
  expect_step(parameters, options);
}

TYPED_TEST(BcgdStepKernels, LaterSteps) {
  auto parameters = make_parameters<TypeParam>();
  for (auto& p : parameters) p.steps = {3};
  expect_step(parameters, {});
}

// Nor do results show where memory begins.
TYPED_TEST(BcgdStepKernels, UnalignedArrays) {
  const std::vector some{make_parameter<TypeParam>(per_tensor(kSliceElements + 13), 1),
                         make_parameter<TypeParam>(per_channel(1, 3, 50), 2)};
  for (const auto projection : {Projection::warm, Projection::lloyd}) {
    Options<TypeParam> options{.projection = projection, .bits = 4};
    const auto aligned = run_step(some, options);
    expect_step<TypeParam>(some, options);
    for (options.unaligned = 0; options.unaligned < 4; ++options.unaligned) {
      const auto unaligned = run_step(some, options);
      for (size_t i = 0; i < some.size(); ++i)
        EXPECT_TRUE(same_bits(unaligned[i].state(), aligned[i].state())) << options.unaligned;
    }
  }
}

TYPED_TEST(BcgdStepKernels, FoundInfChangesNothing) {
  const auto before = make_parameters<TypeParam>();
  for (const auto projection : {Projection::mean, Projection::ternary, Projection::warm, Projection::lloyd}) {
    const auto after = step(
        before, {.projection = projection, .bits = projection == Projection::mean ? 1 : 2, .found_inf = 1});
    for (size_t i = 0; i < before.size(); ++i) EXPECT_TRUE(same_bits(before[i].state(), after[i].state()));
  }
}

// --------------------------------------------------------------------------------------------- the scales

using Latents = std::vector<float>;

// The scale for latents that a step of rate 0 leaves as they are.
template <typename T>
Parameter<T> projected(const std::vector<T>& y, Projection projection, int bits, T before = 1) {
  Parameter<T> p = make_parameter<T>(per_tensor(static_cast<int64_t>(y.size())), 0);
  p.y = y;
  p.g.assign(y.size(), T(0));
  p.scale = {before};
  return step<T>({p}, {projection, bits, {0, 0, 1, 0, 1, 0, 1, false}, false})[0];
}

template <typename T>
double ternary_score(const std::vector<T>& y, double scale) {
  double score;
  fit(y, static_cast<T>(scale), 2, &score);
  return score;
}

// The score S_k / sqrt(k) is 1 for every k but for ripples whose peaks slowly rise: every bin may hold the
// best k, and the best peak is the last. The search needs many rounds.
template <typename T>
std::vector<T> flat_tail(int64_t n, double ripple) {
  const auto sum = [&](double k) {
    const double phase = std::log(k);
    return k < 1 ? 0 : std::sqrt(k) * (1 + ripple * (1 + 0.1 * phase) * std::cos(40 * phase));
  };
  std::vector<T> y(n);
  for (int64_t k = 0; k < n; ++k) y[k] = static_cast<T>(sum(k + 1.0) - sum(double(k)));
  std::shuffle(y.begin(), y.end(), std::mt19937(0));
  return y;
}

template <typename T>
std::vector<std::vector<T>> difficult_latents() {
  std::mt19937 random(1);
  std::normal_distribution<T> normal;
  std::vector<T> gauss(3000), pareto(3000), tiny(500), clusters(3000);
  for (auto& y : gauss) y = normal(random);
  for (auto& y : pareto) y = static_cast<T>(1 / std::sqrt((random() % 100000 + 1) / 100000.0));
  for (auto& y : tiny) y = std::numeric_limits<T>::denorm_min() * static_cast<T>(random() % 100);
  for (auto& y : clusters)
    y = static_cast<T>(std::pow(2.0, random() % 20)) * static_cast<T>(1 + normal(random) * T(1e-4));
  auto outlier = gauss;
  outlier[17] = T(1e30);
  return {gauss,
          pareto,
          tiny,
          clusters,
          outlier,
          flat_tail<T>(3000, 0),
          flat_tail<T>(3000, 5e-5),
          {T(3)},
          {0, 0, 0},
          {T(-2), 2, T(-2)},
          {1, T(0.5)}};
}

template <typename T>
void expect_optimal_ternary(const std::vector<T>& y) {
  const double expected = sorted_ternary_scale(y);
  const double scale = projected<T>(y, Projection::ternary, 2).scale[0];
  const double best = ternary_score(y, expected);
  EXPECT_NEAR(ternary_score(y, scale), best, (std::is_same_v<T, double> ? 1e-12 : 1e-9) * best)
      << scale << " instead of " << expected << " for " << y.size();
}

TEST(BcgdTernary, DifficultLatents) {
  for (const auto& y : difficult_latents<float>()) expect_optimal_ternary(y);
  for (const auto& y : difficult_latents<double>()) expect_optimal_ternary(y);
}

// Large scales take another way: many blocks, and one that goes on where they had to stop.
TEST(BcgdTernary, LargeScales) {
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  std::vector<double> y(kLargeSliceElements + 3);
  for (auto& value : y) value = normal(random);
  expect_optimal_ternary(y);
  expect_optimal_ternary(Latents(y.begin(), y.end()));
  expect_optimal_ternary(flat_tail<float>(kLargeSliceElements + 3, 5e-5));
  const auto small = make_parameter<float>(per_tensor(100), 1);
  const auto channels = make_parameter<float>(per_channel(1, 2, kLargeSliceElements + 1), 2);
  expect_step<float>({small, channels, small}, {.projection = Projection::ternary, .bits = 2});
}

TEST(BcgdScales, NotFiniteIsNaN) {
  const float bad[] = {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()};
  for (const auto projection :
       {Projection::mean, Projection::ternary, Projection::warm, Projection::lloyd, Projection::twn}) {
    const int bits = projection == Projection::mean ? 1 : projection == Projection::warm ? 4 : 2;
    for (const float value : bad) {
      for (const float before : {1.0f, 0.0f}) {
        const auto after = projected<float>({1, -2, value, 3}, projection, bits, before);
        EXPECT_TRUE(std::isnan(after.scale[0]));
        for (const float w : after.w) EXPECT_TRUE(std::isnan(w));
      }
    }
  }
}

TEST(BcgdScales, NoScaleBefore) {
  for (const float before : {0.0f, -1.0f, std::numeric_limits<float>::quiet_NaN()}) {
    const auto after = projected<float>({1, -7.5, 3}, Projection::warm, 4, before);
    EXPECT_EQ(after.scale[0], 1.0f);
    EXPECT_EQ(after.w, (Latents{1, -7, 3}));
  }
}

TEST(BcgdScales, AllZero) {
  for (const auto projection :
       {Projection::mean, Projection::ternary, Projection::warm, Projection::lloyd, Projection::twn}) {
    const auto after = projected<float>({0, 0}, projection, projection == Projection::mean ? 1 : 2);
    EXPECT_EQ(after.scale[0], 0);
    EXPECT_EQ(after.w, (Latents{0, 0}));
  }
}

#ifndef __CUDACC__  // the emulator counts
// The number of launches does not grow with the number of tensors.
TEST(BcgdLaunches, AreFewForManyTensors) {
  const std::vector<Parameter<float>> many(kMaxTensors, make_parameter<float>(per_tensor(5), 1));
  const auto launches = [&](Projection projection, int bits) {
    emu::launches.clear();
    const auto after = run_step<float, kMaxTensors>(many, {.projection = projection, .bits = bits});
    EXPECT_EQ(after.front().state(), after.back().state());
    return emu::launches.size();
  };
  EXPECT_EQ(launches(Projection::warm, 4), 3u);
  EXPECT_EQ(launches(Projection::ternary, 2), 4u);
  EXPECT_EQ(launches(Projection::lloyd, 4), 5u);
}
#endif

TEST(BcgdLaunches, NoTensors) {
  const auto batch = std::make_unique<BatchOf<float>>();
  launch_batch<float>(*batch);
}

}  // namespace
}  // namespace torchqat::cuda::testing
