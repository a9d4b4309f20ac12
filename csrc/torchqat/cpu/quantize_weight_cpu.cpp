#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <memory>
#include <vector>

#include "torchqat/math/exact_scale.h"
#include "torchqat/math/ternary_scale.h"
#include "torchqat/ops/layout.h"
#include "torchqat/ops/quantize_weight_device.h"

namespace torchqat {
namespace {

using math::ChannelView;
using math::MagnitudeSums;
using math::WeightFit;
using math::WeightMethod;

// Weights of a channel that are added up in one go: results do not depend on how many threads share the work.
constexpr int64_t kSlice = 32768;

// The weights in memory, and which of them share a scale.
struct Channels {
  Channels(const at::Tensor& dense, std::optional<int64_t> channel_dim)
      : view(channel_view(dense, wrapped(channel_dim, dense))), size(dense.numel() / view.channels) {}

  // Calls f(position) for the weights [begin, end) of a channel.
  template <typename F>
  void for_each_position(int64_t channel, int64_t begin, int64_t end, F&& f) const {
    for (int64_t j = begin; j < end;) {
      const int64_t run = std::min(end - j, view.inner - j % view.inner);
      const int64_t first = view.position(channel, j);
      for (int64_t p = first; p < first + run; ++p) f(p);
      j += run;
    }
  }

  // Calls f(slice, channel, begin, end) for the slices of all channels, in parallel.
  template <typename F>
  void for_each_slice(F&& f) const {
    const int64_t total = view.channels * slices();
    at::parallel_for(0, total, at::divup(kSlice, std::min(size, kSlice)), [&](int64_t from, int64_t to) {
      for (int64_t s = from; s < to; ++s) {
        const int64_t begin = s % slices() * kSlice;
        f(s, s / slices(), begin, std::min(size, begin + kSlice));
      }
    });
  }

  int64_t slices() const { return at::divup(size, kSlice); }

  ChannelView view;
  int64_t size;  // weights per channel
};

// Sums over each channel: add(sum, channel, position) for its weights.
template <typename Sum, typename Add>
std::vector<Sum> sum_channels(const Channels& channels, Add&& add) {
  std::vector<Sum> partial(channels.view.channels * channels.slices());
  channels.for_each_slice([&](int64_t slice, int64_t channel, int64_t begin, int64_t end) {
    Sum sum;
    channels.for_each_position(channel, begin, end, [&](int64_t p) { add(sum, channel, p); });
    partial[slice] = sum;
  });
  std::vector<Sum> sums(channels.view.channels);
  for (size_t slice = 0; slice < partial.size(); ++slice) {
    auto& sum = sums[slice / channels.slices()];
    sum = sum + partial[slice];
  }
  return sums;
}

template <typename T>
struct SortedWeights {
  int64_t size() const { return n; }
  double magnitude(int64_t i) const { return magnitudes[i]; }
  double sum_of_first(int64_t count) const { return sums[count]; }

  const T* magnitudes;
  const double* sums;
  int64_t n;
};

// One thread, for all levels.
class Alone {
 public:
  static constexpr int kDepth = math::kSearchDepth;
  static int first_level() { return 1; }
  static int stride() { return 1; }
  static const math::StepState& join(const math::StepState& state) { return state; }
  const math::StepState& state(int slot) const { return states_[slot]; }
  void set_state(int slot, const math::StepState& state) { states_[slot] = state; }
  int64_t& count(int slot, int own) { return counts_[slot][own]; }

 private:
  math::StepState states_[kDepth];
  int64_t counts_[kDepth][math::weight_top(8)];
};

// The least-squares scale of finite magnitudes, which it uses up. Sorted magnitudes and their
// sums take 12 bytes per weight, 16 for float64.
template <typename T>
double exact_scale(std::vector<T>& magnitudes, int64_t bits) {
  const auto n = static_cast<int64_t>(magnitudes.size());
  if (bits == 2) return math::exact_ternary_scale(magnitudes);
  std::sort(magnitudes.begin(), magnitudes.end(), std::greater<T>());
  const auto sums = std::make_unique_for_overwrite<double[]>(n + 1);
  sums[0] = 0;
  for (int64_t i = 0; i < n; ++i) sums[i + 1] = sums[i] + magnitudes[i];
  const SortedWeights<T> sorted{magnitudes.data(), sums.get(), n};
  Alone alone;
  const WeightFit fit = math::ExactScaleSearch(sorted, math::weight_top(bits), alone).best();
  return std::isfinite(fit.overlap) ? fit.scale() : std::numeric_limits<double>::quiet_NaN();
}

// The weights of one dtype, being quantized.
template <typename scalar_t>
class Quantizer {
 public:
  using opmath_t = at::opmath_type<scalar_t>;

  Quantizer(const scalar_t* weight, const Channels& channels, WeightMethod method, int64_t bits)
      : weight_(weight), channels_(channels), method_(method), bits_(bits) {}

  // The cut and the scale of each channel.
  void fit() {
    const auto sums = sum_channels<MagnitudeSums>(
        channels_, [&](MagnitudeSums& sum, int64_t, int64_t p) { sum.add(value(p)); });
    for (const auto& sum : sums)
      cuts_.push_back(static_cast<opmath_t>(sum.cut(method_, bits_, channels_.size)));
    if (bits_ > 1 && method_ == WeightMethod::exact) fit_exactly();
    scales_ = cuts_;
    if (bits_ > 1 && method_ != WeightMethod::exact) fit_to_levels();
  }

  void write(scalar_t* quantized) const {
    channels_.for_each_slice([&](int64_t, int64_t channel, int64_t begin, int64_t end) {
      const opmath_t scale = scales_[channel];
      channels_.for_each_position(channel, begin, end, [&](int64_t p) {
        quantized[p] = static_cast<scalar_t>(scale * level(channel, p));
      });
    });
  }

  const std::vector<opmath_t>& scales() const { return scales_; }

 private:
  opmath_t value(int64_t p) const { return static_cast<opmath_t>(weight_[p]); }
  opmath_t level(int64_t channel, int64_t p) const {
    return math::assigned_level(value(p), cuts_[channel], method_, bits_);
  }

  void fit_exactly() {
    at::parallel_for(
        0, channels_.view.channels, at::divup(kSlice, channels_.size), [&](int64_t from, int64_t to) {
          std::vector<opmath_t> magnitudes;
          for (int64_t channel = from; channel < to; ++channel) {
            if (std::isnan(cuts_[channel])) continue;
            magnitudes.clear();
            magnitudes.reserve(channels_.size);
            channels_.for_each_position(channel, 0, channels_.size,
                                        [&](int64_t p) { magnitudes.push_back(std::abs(value(p))); });
            cuts_[channel] = static_cast<opmath_t>(exact_scale(magnitudes, bits_));
          }
        });
  }

  void fit_to_levels() {
    const auto fits = sum_channels<WeightFit>(
        channels_, [&](WeightFit& fit, int64_t channel, int64_t p) { fit.add(value(p), level(channel, p)); });
    for (size_t c = 0; c < fits.size(); ++c) {
      if (!std::isnan(cuts_[c])) scales_[c] = static_cast<opmath_t>(fits[c].scale());
    }
  }

  const scalar_t* weight_;
  Channels channels_;
  WeightMethod method_;
  int64_t bits_;
  std::vector<opmath_t> cuts_;
  std::vector<opmath_t> scales_;
};

std::tuple<at::Tensor, at::Tensor> quantize(const at::Tensor& weight, int64_t bits, std::string_view method,
                                            std::optional<int64_t> channel_dim) {
  auto [quantized, scale] = quantize_weight_meta(weight, bits, method, channel_dim);
  if (weight.numel() == 0) return {quantized, scale.zero_()};
  const auto in = laid_out_as(weight, quantized);
  const Channels channels(quantized, channel_dim);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weight.scalar_type(), "quantize_weight_cpu",
                                  [&, quantized = quantized, scale = scale] {
                                    Quantizer<scalar_t> quantizer(
                                        in.const_data_ptr<scalar_t>(), channels,
                                        weight_method("quantize_weight", method, bits), bits);
                                    quantizer.fit();
                                    quantizer.write(quantized.mutable_data_ptr<scalar_t>());
                                    std::copy(quantizer.scales().begin(), quantizer.scales().end(),
                                              scale.template mutable_data_ptr<at::opmath_type<scalar_t>>());
                                  });
  return {quantized, scale};
}

at::Tensor codes(const at::Tensor& weight, const at::Tensor& scale, int64_t bits,
                 std::optional<int64_t> channel_dim) {
  auto levels = weight_codes_meta(weight, scale, bits, channel_dim);
  if (weight.numel() == 0) return levels;
  const auto in = laid_out_as(weight, levels);
  const auto steps = scale.contiguous();
  const Channels channels(levels, channel_dim);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, weight.scalar_type(), "weight_codes_cpu", [&] {
    using opmath_t = at::opmath_type<scalar_t>;
    const auto* w = in.const_data_ptr<scalar_t>();
    const auto* step = steps.const_data_ptr<opmath_t>();
    auto* level = levels.mutable_data_ptr<int8_t>();
    channels.for_each_slice([&](int64_t, int64_t channel, int64_t begin, int64_t end) {
      channels.for_each_position(channel, begin, end, [&](int64_t p) {
        level[p] = static_cast<int8_t>(math::weight_level(static_cast<opmath_t>(w[p]), step[channel], bits));
      });
    });
  });
  return levels;
}

}  // namespace

TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("quantize_weight", quantize);
  m.impl("weight_codes", codes);
}

}  // namespace torchqat
