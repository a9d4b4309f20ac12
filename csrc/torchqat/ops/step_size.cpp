#include "torchqat/ops/step_size.h"

#include <torch/library.h>

#include <algorithm>
#include <cmath>

namespace torchqat {
namespace {

// A bin is the leading bits of a float32: its exponent, from 2^-30 to 2^30, and this much of its mantissa.
constexpr float kLow = 0x1p-30f;
constexpr float kHigh = 0x1p30f;
constexpr int kMantissaBits = 11;
constexpr int kMantissaBitsPerChannel = 8;  // where there are several channels
constexpr int64_t kCoarse = 256;
constexpr int64_t kFine = 65;

int shift_of(int64_t channels) { return 23 - (channels == 1 ? kMantissaBits : kMantissaBitsPerChannel); }

int64_t bin_of(float value, int shift) {
  return at::scalar_tensor(value).view(at::kInt).item<int>() >> shift;
}

// Weighted bins, each taken as uniform between its edges.
struct Sample {
  at::Tensor lower, upper, weight, count, sum;

  Sample(at::Tensor lower, at::Tensor upper, at::Tensor weight)
      : lower(lower),
        upper(upper),
        weight(weight),
        count(weight.cumsum(0)),
        sum((weight * (lower + upper) / 2).cumsum(0)) {}

  // How many values are at most `bound`, and their sum.
  std::pair<at::Tensor, at::Tensor> up_to(const at::Tensor& bound) const {
    const auto i = at::searchsorted(upper, bound).clamp_max(upper.numel() - 1);
    const auto at_bin = [&](const at::Tensor& t) { return t.index({i}); };
    const auto inside = bound.clamp(at_bin(lower), at_bin(upper));
    const auto missing = at_bin(weight) * (at_bin(upper) - inside) / (at_bin(upper) - at_bin(lower));
    return {at_bin(count) - missing, at_bin(sum) - missing * (at_bin(upper) + inside) / 2};
  }

  // The squared error of the staircase of each step size, less the sum of squares.
  at::Tensor errors(const at::Tensor& steps, int64_t top) const {
    const auto k = at::arange(1, top, at::kDouble);
    const auto [count_to, sum_to] = up_to(steps.unsqueeze(1) * k);
    const auto inner = top * sum[-1] - sum_to.sum(1);                             // sum of level * x
    const auto square = top * top * count[-1] - (count_to * (2 * k + 1)).sum(1);  // sum of level^2
    return steps.square() * square - 2 * steps * inner;
  }
};

double best_step(const at::Tensor& counts, int64_t top, int shift) {
  const auto used = counts.nonzero().squeeze(1);
  if (used.numel() == 0) return std::nan("");
  const int64_t first = bin_of(kLow, shift);
  const auto edge = [&](int64_t i) {
    return at::bitwise_left_shift(used + (first + i), shift).to(at::kInt).view(at::kFloat).to(at::kDouble);
  };
  const Sample sample(edge(0), edge(1), counts.index({used}).to(at::kDouble));
  // Below mean / (2 top) the error only falls as the step grows, above the largest value it only grows.
  const double low = std::log2((sample.sum[-1] / sample.count[-1] / (2 * top)).item<double>());
  const double high = std::log2(sample.upper[-1].item<double>());
  const auto steps = at::logspace(low, high, kCoarse, 2.0, at::kDouble);
  const auto best = sample.errors(steps, top).argmin().item<int64_t>();
  const auto fine = at::linspace(steps[std::max<int64_t>(best - 1, 0)].item<double>(),
                                 steps[std::min(best + 1, kCoarse - 1)].item<double>(), kFine, at::kDouble);
  return fine[sample.errors(fine, top).argmin()].item<double>();
}

}  // namespace

at::Tensor empty_magnitude_counts(int64_t channels) {
  const int shift = shift_of(channels);
  return at::zeros({channels, bin_of(kHigh, shift) - bin_of(kLow, shift) + 1}, at::kLong);
}

void count_magnitudes(const at::Tensor& x, const at::Tensor& counts) {
  TORCH_CHECK_VALUE(counts.dim() == 2, "count_magnitudes: counts must have shape [channels, bins], got ",
                    counts.sizes());
  const int64_t channels = counts.size(0);
  const int64_t bins = counts.size(1);
  TORCH_CHECK_VALUE(channels == 1 || (x.dim() >= 2 && x.size(1) == channels),
                    "count_magnitudes: x must have ", channels, " channels in dimension 1, got shape ",
                    x.sizes());
  const int shift = shift_of(channels);
  const auto values = x.detach().to(at::kFloat);
  auto index = at::bitwise_right_shift(values.clamp(kLow, kHigh).contiguous().view(at::kInt), shift) -
               bin_of(kLow, shift);
  if (channels > 1) {
    std::vector<int64_t> shape(x.dim() - 1, 1);
    shape[0] = -1;
    index = index + at::arange(channels, index.options()).view(shape) * bins;
  }
  const auto found = at::bincount(index.index({values > 0}), {}, channels * bins);
  at::Tensor(counts).add_(found.view({channels, bins}).to(counts.device()));
}

std::vector<double> best_step_sizes(const at::Tensor& counts, int64_t bits) {
  std::vector<double> steps;
  for (const auto& channel : counts.unbind())
    steps.push_back(best_step(channel, (int64_t{1} << bits) - 1, shift_of(counts.size(0))));
  return steps;
}

}  // namespace torchqat
