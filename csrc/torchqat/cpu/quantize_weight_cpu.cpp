#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "torchqat/cpu/quantize_weight_kernels.h"
#include "torchqat/cpu/radix_sort.h"
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

template <typename S>
const auto& kernels() {
  return TORCHQAT_BEST_ISA(quantize_weight_kernels<S, at::opmath_type<S>>());
}

// Weights of a channel that are added up in one go: results do not depend on how many threads share the work.
constexpr int64_t kSlice = 32768;

// Weights that a kernel gets at a time: sums have the same order whether or not they are neighbors in memory.
constexpr int64_t kTogether = 1024;
static_assert(kSlice % kTogether == 0);

// The weights in memory, and which of them share a scale.
struct Channels {
  Channels(const at::Tensor& dense, std::optional<int64_t> channel_dim)
      : view(channel_view(dense, wrapped(channel_dim, dense))), size(dense.numel() / view.channels) {}

  // Calls f(position, count) for the runs of neighbors in memory that make up weights [begin, end) of a
  // channel.
  template <typename F>
  void for_each_run(int64_t channel, int64_t begin, int64_t end, F&& f) const {
    for (int64_t j = begin; j < end;) {
      const int64_t count = view.channels == 1 ? end - j : std::min(end - j, view.inner - j % view.inner);
      f(view.position(channel, j), count);
      j += count;
    }
  }

  // Calls f(values, count) for the weights [begin, end) of a channel, some at a time; they are in a row.
  template <typename S, typename F>
  void read(const S* weight, int64_t channel, int64_t begin, int64_t end, F&& f) const {
    S copies[kTogether];
    for (int64_t j = begin; j < end; j += kTogether) {
      const int64_t count = std::min(end - j, kTogether);
      if (is_one_run(j, count)) {
        f(weight + view.position(channel, j), count);
        continue;
      }
      S* to = copies;
      for_each_run(channel, j, j + count, [&](int64_t p, int64_t n) { to = std::copy_n(weight + p, n, to); });
      f(copies, count);
    }
  }

  // Calls f(values, results, count) likewise; f writes the result of each weight.
  template <typename S, typename R, typename F>
  void map(const S* weight, R* result, int64_t channel, int64_t begin, int64_t end, F&& f) const {
    R results[kTogether];
    int64_t j = begin;
    read(weight, channel, begin, end, [&](const S* values, int64_t count) {
      if (is_one_run(j, count)) {
        f(values, result + view.position(channel, j), count);
      } else {
        f(values, results, count);
        const R* from = results;
        for_each_run(channel, j, j + count, [&](int64_t p, int64_t n) {
          std::copy_n(from, n, result + p);
          from += n;
        });
      }
      j += count;
    });
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
  bool is_one_run(int64_t begin, int64_t count) const {
    return view.channels == 1 || begin / view.inner == (begin + count - 1) / view.inner;
  }

  ChannelView view;
  int64_t size;  // weights per channel
};

// Sums over each channel: add(sum, channel, begin, end) for some of its weights.
template <typename Sum, typename Add>
std::vector<Sum> sum_channels(const Channels& channels, Add&& add) {
  std::vector<Sum> partial(channels.view.channels * channels.slices());
  channels.for_each_slice([&](int64_t slice, int64_t channel, int64_t begin, int64_t end) {
    add(partial[slice], channel, begin, end);
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
  sort_magnitudes(magnitudes);
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
        channels_, [&](MagnitudeSums& sum, int64_t channel, int64_t begin, int64_t end) {
          channels_.read(weight_, channel, begin, end, [&](const scalar_t* w, int64_t n) {
            kernels<scalar_t>().add_magnitudes(w, n, sum);
          });
        });
    for (const auto& sum : sums)
      cuts_.push_back(static_cast<opmath_t>(sum.cut(method_, bits_, channels_.size)));
    if (bits_ > 1 && method_ == WeightMethod::exact) fit_exactly();
    scales_ = cuts_;
    if (bits_ > 1 && method_ != WeightMethod::exact) fit_to_levels();
  }

  void write(scalar_t* quantized) const {
    channels_.for_each_slice([&](int64_t, int64_t channel, int64_t begin, int64_t end) {
      channels_.map(weight_, quantized, channel, begin, end, [&](const scalar_t* w, scalar_t* to, int64_t n) {
        kernels<scalar_t>().quantize(w, to, n, rule(channel), scales_[channel]);
      });
    });
  }

  const std::vector<opmath_t>& scales() const { return scales_; }

 private:
  LevelRule<opmath_t> rule(int64_t channel) const { return {cuts_[channel], method_, bits_}; }

  void fit_exactly() {
    at::parallel_for(
        0, channels_.view.channels, at::divup(kSlice, channels_.size), [&](int64_t from, int64_t to) {
          std::vector<opmath_t> magnitudes;
          for (int64_t channel = from; channel < to; ++channel) {
            if (std::isnan(cuts_[channel])) continue;
            magnitudes.resize(channels_.size);
            auto* m = magnitudes.data();
            channels_.read(weight_, channel, 0, channels_.size, [&](const scalar_t* w, int64_t n) {
              for (int64_t i = 0; i < n; ++i) m[i] = std::abs(static_cast<opmath_t>(w[i]));
              m += n;
            });
            cuts_[channel] = static_cast<opmath_t>(exact_scale(magnitudes, bits_));
          }
        });
  }

  void fit_to_levels() {
    const auto fits =
        sum_channels<WeightFit>(channels_, [&](WeightFit& fit, int64_t channel, int64_t begin, int64_t end) {
          channels_.read(weight_, channel, begin, end, [&](const scalar_t* w, int64_t n) {
            kernels<scalar_t>().add_levels(w, n, rule(channel), fit);
          });
        });
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
      channels.map(w, level, channel, begin, end, [&](const scalar_t* from, int8_t* to, int64_t n) {
        kernels<scalar_t>().codes(from, to, n, {step[channel], WeightMethod::exact, bits});
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
