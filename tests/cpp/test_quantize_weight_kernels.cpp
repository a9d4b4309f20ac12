#include <cmath>
#include <functional>
#include <numeric>
#include <random>

#include "exact_scale.cuh"
#include "kernel_test.h"
#include "quantize_weight.cuh"

// The kernels of quantize_weight and weight_codes, in the order in which quantize_weight.cu launches them;
// CUB's sort is std::sort here. References are plain loops.
namespace torchqat::cuda::testing {
namespace {

using math::ChannelView;
using math::WeightMethod;

template <typename T>
class QuantizeWeightKernels : public ::testing::Test {};
TYPED_TEST_SUITE(QuantizeWeightKernels, StorageTypes);

std::string name_of(const ChannelSlices& s) {
  return std::to_string(s.view.channels) + " channels of " + std::to_string(s.size) + ", inner " +
         std::to_string(s.view.inner);
}

ChannelSlices per_tensor(int64_t n) { return {{1, n}, n}; }
ChannelSlices per_channel(int64_t channels, int64_t inner, int64_t outer) {
  return {{channels, inner}, inner * outer};
}

// Around a warp, a block, a chunk of prefix sums and a slice; channels in front, in the middle and last.
std::vector<ChannelSlices> shapes() {
  std::vector<ChannelSlices> all;
  for (const int64_t n : {int64_t{1}, int64_t{33}, int64_t{257}, kChunk - 1, kChunk, kChunk + 1, kWeightSlice,
                          kWeightSlice + 1, 2 * kWeightSlice + 9}) {
    all.push_back(per_tensor(n));
  }
  all.push_back(per_channel(5, 27, 1));
  all.push_back(per_channel(3, 4, 7));
  all.push_back(per_channel(33, 1, 6));
  all.push_back(per_channel(2, kChunk + 1, 1));
  all.push_back(per_channel(2, 1, kWeightSlice + 3));
  return all;
}

// Multiples of 1/64, so that sums are exact in any order.
template <typename T>
std::vector<T> weights(const ChannelSlices& slices) {
  std::mt19937 random(static_cast<unsigned>(slices.weights()));
  std::vector<T> w(slices.weights());
  for (T& value : w) value = static_cast<T>((static_cast<int>(random() % 257) - 128) / 64.0F);
  return w;
}

// The weights of a channel, in op-math precision.
template <typename T>
std::vector<opmath_t<T>> channel_of(const std::vector<T>& w, const ChannelSlices& slices, int64_t channel) {
  std::vector<opmath_t<T>> values;
  for (int64_t p = 0; p < slices.weights(); ++p) {
    if (p / slices.view.inner % slices.view.channels == channel)
      values.push_back(static_cast<opmath_t<T>>(w[p]));
  }
  return values;
}

// cut, scale, quantized weights and codes.
template <typename T>
using Result =
    std::tuple<std::vector<opmath_t<T>>, std::vector<opmath_t<T>>, std::vector<T>, std::vector<int8_t>>;

template <typename T>
void launch_exact(Buffer<T>& w, Buffer<opmath_t<T>>& scale, const ChannelSlices& slices, int64_t bits) {
  using op_t = opmath_t<T>;
  const int64_t channels = slices.view.channels;
  Buffer<op_t> magnitudes(slices.weights());
  Buffer<double> sums(slices.weights());
  Buffer<double> chunk_sums(channels * chunks_of(slices.size));
  expect_success(launch(magnitudes_kernel<T, op_t>, blocks_for(slices.weights(), 4), nullptr, w.data(),
                        magnitudes.data(), slices));
  auto sorted = magnitudes.contents();
  for (int64_t c = 0; c < channels; ++c) {
    const auto first = sorted.begin() + c * slices.size;
    if (std::none_of(first, first + slices.size, [](op_t m) { return std::isnan(m); })) {
      std::sort(first, first + slices.size, std::greater<op_t>());
    }
  }
  magnitudes.assign(sorted);
  expect_success(
      launch_prefix_sums(magnitudes.data(), sums.data(), chunk_sums.data(), channels, slices.size, nullptr));
  expect_success(launch(exact_scale_kernel<op_t>, blocks_of(channels), nullptr, magnitudes.data(),
                        sums.data(), chunk_sums.data(), scale.data(), channels, slices.size,
                        math::weight_top(bits)));
}

template <typename T>
Result<T> run(const std::vector<T>& values, const ChannelSlices& slices, WeightMethod method, int64_t bits) {
  using op_t = opmath_t<T>;
  return in_every_world([&] {
    Buffer<T> w(values);
    Buffer<op_t> other(slices.view.channels);
    Buffer<op_t> scale(slices.view.channels);
    Buffer<math::MagnitudeSums> sums(slices.total());
    Buffer<math::WeightFit> fits(slices.total());
    Buffer<T> quantized(slices.weights());
    Buffer<int8_t> codes(slices.weights());
    op_t* const cut = method == WeightMethod::exact ? scale.data() : other.data();
    expect_success(launch_channel_sums(sums.data(), slices, AddMagnitude<T, op_t>{w.data()},
                                       SetCut<op_t>{cut, method, bits, slices.size}, nullptr));
    if (method != WeightMethod::exact) {
      expect_success(launch_channel_sums(fits.data(), slices, AddFit<T, op_t>{w.data(), cut, method, bits},
                                         SetScale<op_t>{scale.data(), cut}, nullptr));
    } else if (bits > 1) {
      launch_exact(w, scale, slices, bits);
    }
    const Quantized<T, op_t> write{w.data(), cut, scale.data(), method, bits};
    expect_success(launch_write_weights(quantized.data(), slices, write, nullptr));
    expect_success(
        launch_write_weights(codes.data(), slices, Codes<T, op_t>{w.data(), scale.data(), bits}, nullptr));
    return Result<T>{(method == WeightMethod::exact ? scale : other).contents(), scale.contents(),
                     quantized.contents(), codes.contents()};
  });
}

template <typename T>
void expect_written(const Result<T>& result, const std::vector<T>& w, const ChannelSlices& slices,
                    WeightMethod method, int64_t bits) {
  const auto& [cut, scale, quantized, codes] = result;
  for (int64_t p = 0; p < slices.weights(); ++p) {
    const int64_t c = p / slices.view.inner % slices.view.channels;
    const auto v = static_cast<opmath_t<T>>(w[p]);
    const T expected = static_cast<T>(scale[c] * math::assigned_level(v, cut[c], method, bits));
    ASSERT_TRUE(same_bits(quantized[p], expected)) << p;
    ASSERT_EQ(codes[p], static_cast<int8_t>(math::weight_level(v, scale[c], bits))) << p;
  }
}

TYPED_TEST(QuantizeWeightKernels, MethodsThatNeedSumsAlone) {
  using T = TypeParam;
  using op_t = opmath_t<T>;
  for (const auto& slices : shapes()) {
    SCOPED_TRACE(name_of(slices));
    const auto w = weights<T>(slices);
    for (const auto& [method, bits] : {std::pair(WeightMethod::exact, 1), std::pair(WeightMethod::lloyd, 4),
                                       std::pair(WeightMethod::twn, 2)}) {
      const auto result = run(w, slices, method, bits);
      expect_written(result, w, slices, method, bits);
      for (int64_t c = 0; c < slices.view.channels; ++c) {
        double sum = 0, largest = 0, overlap = 0, energy = 0;
        const auto values = channel_of(w, slices, c);
        for (const op_t v : values)
          sum += std::abs(double(v)), largest = std::max(largest, std::abs(double(v)));
        const double mean = sum / static_cast<double>(slices.size);
        const op_t cut = static_cast<op_t>(bits == 1   ? mean
                                           : bits == 2 ? 0.7 * mean
                                                       : 2 * largest / (std::pow(2, bits) - 1));
        ASSERT_EQ(std::get<0>(result)[c], cut);
        for (const op_t v : values) {
          const double q = math::assigned_level(v, cut, method, bits);
          overlap += double(v) * q, energy += q * q;
        }
        ASSERT_EQ(std::get<1>(result)[c], static_cast<op_t>(bits == 1 ? mean : overlap / energy));
      }
    }
  }
}

// The best score of all breakpoints, one after the other.
template <typename T>
math::WeightFit sweep(const std::vector<T>& w, int top) {
  std::vector<std::pair<double, std::pair<double, double>>> moves;
  for (const T value : w) {
    const double m = std::abs(static_cast<double>(value));
    for (int j = 1; j <= top && m > 0; ++j) moves.push_back({m / (j - 0.5), {2.0 * j - 1, m}});
  }
  std::sort(moves.rbegin(), moves.rend());
  math::WeightFit fit, best;
  for (const auto& [breakpoint, move] : moves) {
    fit = fit + math::WeightFit{move.first, move.second};
    if (fit.score() > best.score()) best = fit;
  }
  return best;
}

template <typename T>
math::WeightFit fit_of(const std::vector<T>& w, double scale, int64_t bits) {
  math::WeightFit fit;
  for (const T v : w) {
    const auto value = static_cast<double>(v);
    fit.add(value, math::weight_level(value, scale, bits));
  }
  return fit;
}

TYPED_TEST(QuantizeWeightKernels, ExactScaleIsTheBestOfAllBreakpoints) {
  using T = TypeParam;
  for (const auto& slices : shapes()) {
    SCOPED_TRACE(name_of(slices));
    const auto w = weights<T>(slices);
    const int64_t bits = slices.size == 27 ? 8 : slices.view.channels == 1 ? 3 : 2;
    const auto result = run(w, slices, WeightMethod::exact, bits);
    expect_written(result, w, slices, WeightMethod::exact, bits);
    for (int64_t c = 0; c < slices.view.channels; ++c) {
      const auto values = channel_of(w, slices, c);
      const double best = sweep(values, math::weight_top(bits)).score();
      // The levels of the rounded scale: ties may fall to either side, at no cost.
      EXPECT_NEAR(fit_of(values, std::get<1>(result)[c], bits).score(), best, 1e-6 * best);
      EXPECT_TRUE(same_bits(std::get<0>(result)[c], std::get<1>(result)[c]));
    }
  }
}

TYPED_TEST(QuantizeWeightKernels, WhatIsZeroOrNotANumber) {
  using T = TypeParam;
  const ChannelSlices slices = per_channel(4, 3, 20);
  auto w = weights<T>(slices);
  for (int64_t j = 0; j < slices.size; ++j) w[slices.view.position(2, j)] = static_cast<T>(0.0F);
  w[slices.view.position(1, 5)] = static_cast<T>(std::nanf(""));
  w[slices.view.position(3, 7)] = static_cast<T>(-HUGE_VALF);
  for (const auto& [method, bits] : {std::pair(WeightMethod::exact, 1), std::pair(WeightMethod::exact, 4),
                                     std::pair(WeightMethod::lloyd, 4), std::pair(WeightMethod::twn, 2)}) {
    const auto& [cut, scale, quantized, codes] = run(w, slices, method, bits);
    EXPECT_GT(scale[0], 0);
    EXPECT_TRUE(std::isnan(scale[1]));
    EXPECT_EQ(scale[2], 0);
    EXPECT_TRUE(std::isnan(scale[3]));
    for (int64_t j = 0; j < slices.size; ++j) {
      EXPECT_TRUE(std::isnan(static_cast<float>(quantized[slices.view.position(1, j)])));
      EXPECT_TRUE(same_bits(quantized[slices.view.position(2, j)], static_cast<T>(0.0F)));
      EXPECT_TRUE(std::isnan(static_cast<float>(quantized[slices.view.position(3, j)])));
    }
  }
}

// Beyond kMaxBlocks a block takes more than one slice, and more than one channel.
TEST(ChannelSums, DoNotDependOnTheNumberOfBlocks) {
  using Sums = math::MagnitudeSums;
  using Add = AddMagnitude<float, float>;
  const ChannelSlices slices = per_channel(3, 1, kWeightSlice + 3);
  const auto w = weights<float>(slices);
  const auto cuts = [&](unsigned blocks) {
    return in_every_world([&] {
      Buffer<float> weight(w), cut(3);
      Buffer<Sums> partial(slices.total());
      expect_success(
          launch(sum_slices_kernel<Sums, Add>, blocks, nullptr, partial.data(), slices, Add{weight.data()}));
      expect_success(launch(finish_channels_kernel<Sums, SetCut<float>>, blocks, nullptr, partial.data(),
                            slices, SetCut<float>{cut.data(), WeightMethod::lloyd, 4, slices.size}));
      return cut.contents();
    });
  };
  const auto expected = cuts(6);
  for (const unsigned blocks : {1, 2, 4}) EXPECT_EQ(cuts(blocks), expected) << blocks;
}

TEST(ExactScale, DoesNotDependOnTheNumberOfBlocks) {
  constexpr int64_t kChannels = 5, kSize = kChunk + 3;
  std::vector<float> values(kChannels * kSize);
  for (int64_t i = 0; i < kChannels * kSize; ++i)
    values[i] = static_cast<float>((kSize - i % kSize) * (i / kSize + 1)) / 64;
  const auto scales = [&](unsigned blocks) {
    return in_every_world([&] {
      Buffer<float> magnitudes(values), scale(std::vector<float>(kChannels, 1));
      Buffer<double> sums(kChannels * kSize), chunk_sums(kChannels * chunks_of(kSize));
      expect_success(launch(prefix_in_chunks_kernel<float>, blocks, nullptr, magnitudes.data(), sums.data(),
                            chunk_sums.data(), kChannels, kSize));
      expect_success(
          launch(prefix_of_chunks_kernel<double>, blocks, nullptr, chunk_sums.data(), kChannels, kSize));
      expect_success(launch(exact_scale_kernel<float>, blocks, nullptr, magnitudes.data(), sums.data(),
                            chunk_sums.data(), scale.data(), kChannels, kSize, math::weight_top(3)));
      return scale.contents();
    });
  };
  const auto expected = scales(kChannels);
  for (const unsigned blocks : {1, 2}) EXPECT_EQ(scales(blocks), expected) << blocks;
}

TEST(PrefixSums, AreThoseOfALoopAcrossChunks) {
  for (const int64_t size : {int64_t{1}, int64_t{9}, kChunk, kChunk + 1, kChunk * (kThreads + 1) + 5}) {
    const int64_t channels = size < 2 * kChunk ? 3 : 1;
    std::vector<float> values(channels * size);
    std::iota(values.begin(), values.end(), 1.0F);  // integers: exact in any order
    const auto result = in_every_world([&] {
      Buffer<float> magnitudes(values);
      Buffer<double> sums(channels * size), chunk_sums(channels * chunks_of(size));
      expect_success(
          launch_prefix_sums(magnitudes.data(), sums.data(), chunk_sums.data(), channels, size, nullptr));
      return std::tuple(sums.contents(), chunk_sums.contents());
    });
    const auto& [sums, chunks_before] = result;
    for (int64_t c = 0; c < channels; ++c) {
      const SortedChannel<float> channel{&values[c * size], &sums[c * size],
                                         &chunks_before[c * chunks_of(size)], size};
      double expected = 0;
      for (int64_t count = 0; count <= size; ++count) {
        ASSERT_EQ(channel.sum_of_first(count), expected) << size << " " << count;
        if (count < size) expected += values[c * size + count];
      }
    }
  }
}

}  // namespace
}  // namespace torchqat::cuda::testing
