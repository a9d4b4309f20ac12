#include "torchqat/nn/quant_layers.h"

#include <ATen/ATen.h>

#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "torchqat/ops/layers.h"

namespace torchqat::nn {
namespace {

// What torch prints of a layer, under our name: "torch::nn::Conv2d(" becomes "torchqat::nn::QuantConv2d(".
template <typename Print>
void print_as_ours(std::ostream& stream, Print&& print) {
  std::ostringstream text;
  print(text);
  stream << "torchqat::nn::Quant" << text.str().substr(std::string("torch::nn::").size());
}

template <size_t D>
torch::nn::detail::ConvNdOptions<D> as_nd(const torch::nn::ConvOptions<D>& options) {
  return torch::nn::detail::ConvNdOptions<D>(options.in_channels(), options.out_channels(),
                                             options.kernel_size())
      .stride(options.stride())
      .padding(options.padding())
      .dilation(options.dilation())
      .groups(options.groups())
      .bias(options.bias())
      .padding_mode(options.padding_mode());
}

// How a convolution pads; none with zeros.
std::optional<std::string_view> pad_mode(const torch::nn::detail::conv_padding_mode_t& mode) {
  if (std::holds_alternative<torch::enumtype::kReflect>(mode)) return "reflect";
  if (std::holds_alternative<torch::enumtype::kReplicate>(mode)) return "replicate";
  if (std::holds_alternative<torch::enumtype::kCircular>(mode)) return "circular";
  return std::nullopt;
}

// The zeros on both sides of each dimension; none where padding "same" of an even kernel is uneven.
template <size_t D>
std::optional<std::vector<int64_t>> zeros_around(const torch::nn::detail::ConvNdOptions<D>& options) {
  if (const auto* padding = std::get_if<torch::ExpandingArray<D>>(&options.padding()))
    return at::IntArrayRef(**padding).vec();
  std::vector<int64_t> zeros(D, 0);
  if (std::holds_alternative<torch::enumtype::kValid>(options.padding())) return zeros;
  for (size_t d = 0; d < D; ++d) {
    const int64_t both = (*options.dilation())[d] * ((*options.kernel_size())[d] - 1);
    if (both % 2) return std::nullopt;
    zeros[d] = both / 2;
  }
  return zeros;
}

void check_dim(const at::Tensor& input, bool fits, const char* layer, const char* wanted) {
  TORCH_CHECK_VALUE(fits, layer, ": input must have ", wanted, " dimensions, got ", input.dim());
}

}  // namespace

template <size_t D, typename Derived>
QuantConvNdImpl<D, Derived>::QuantConvNdImpl(const torch::nn::ConvOptions<D>& options)
    : torch::nn::ConvNdImpl<D, Derived>(as_nd(options)) {}

template <size_t D, typename Derived>
at::Tensor QuantConvNdImpl<D, Derived>::forward(const at::Tensor& input) {
  const auto& options = this->options;
  const auto convolve = [&](const at::Tensor& x, at::IntArrayRef zeros) {
    return layer_convolution(x, this->weight, this->bias, *options.stride(), zeros, *options.dilation(),
                             options.groups(), recompute);
  };
  const auto zeros = zeros_around<D>(options);
  if (const auto mode = pad_mode(options.padding_mode())) {
    // As torch.nn in Python; LibTorch's own layer exchanges the dimensions of padding "same".
    std::vector<int64_t> sides;  // the last dimension first, both sides of each
    for (size_t d = D; d-- > 0;) {
      const int64_t both = (*options.dilation())[d] * ((*options.kernel_size())[d] - 1);
      const int64_t left = zeros ? (*zeros)[d] : both / 2;
      sides.insert(sides.end(), {left, zeros ? left : both - left});
    }
    return convolve(at::pad(input, sides, *mode), std::vector<int64_t>(D, 0));
  }
  if (zeros) return convolve(input, *zeros);
  if constexpr (D == 1)  // torch's own
    return at::conv1d(input, this->weight, this->bias, *options.stride(), "same", *options.dilation(),
                      options.groups());
  else
    return at::conv2d(input, this->weight, this->bias, *options.stride(), "same", *options.dilation(),
                      options.groups());
}

template <size_t D, typename Derived>
void QuantConvNdImpl<D, Derived>::pretty_print(std::ostream& stream) const {
  print_as_ours(stream, [&](std::ostream& text) { torch::nn::ConvNdImpl<D, Derived>::pretty_print(text); });
}

template class QuantConvNdImpl<1, QuantConv1dImpl>;
template class QuantConvNdImpl<2, QuantConv2dImpl>;

at::Tensor QuantLinearImpl::forward(const at::Tensor& input) { return layer_linear(input, weight, bias); }

void QuantLinearImpl::pretty_print(std::ostream& stream) const {
  print_as_ours(stream, [&](std::ostream& text) { LinearImpl::pretty_print(text); });
}

std::shared_ptr<torch::nn::Module> QuantLinearImpl::clone(const std::optional<torch::Device>& device) const {
  torch::NoGradGuard no_grad;
  auto copy = std::make_shared<QuantLinearImpl>(options);
  copy->train(is_training());
  const auto parameters = named_parameters(/*recurse=*/false);
  for (auto& parameter : copy->named_parameters(/*recurse=*/false)) {
    const auto& own = parameters[parameter.key()];
    parameter.value().set_data(device && own.device() != *device ? own.to(*device) : own.clone());
  }
  return copy;
}

at::Tensor QuantMaxPool2dImpl::forward(const at::Tensor& input) {
  return layer_max_pool2d(input, *options.kernel_size(), *options.stride(), *options.padding(),
                          *options.dilation(), options.ceil_mode());
}

void QuantMaxPool2dImpl::pretty_print(std::ostream& stream) const {
  print_as_ours(stream, [&](std::ostream& text) { torch::nn::MaxPool2dImpl(options).pretty_print(text); });
}

template <size_t D, typename Derived>
at::Tensor QuantBatchNormImpl<D, Derived>::forward(const at::Tensor& input) {
  const auto& options = this->options;
  if (!this->is_training() || !this->running_mean.defined())
    return torch::nn::BatchNormImplBase<D, Derived>::forward(input);
  this->_check_input_dim(input);
  TORCH_CHECK_VALUE(input.numel() != input.size(1), "QuantBatchNorm", D,
                    "d: in training there must be more than one value per channel, got an input of ",
                    input.sizes());
  this->num_batches_tracked += 1;
  const double momentum = options.momentum()  // none: the mean over all batches
                              ? *options.momentum()
                              : 1.0 / this->num_batches_tracked.template item<double>();
  return layer_batch_norm(input, this->weight, this->bias, this->running_mean, this->running_var, momentum,
                          options.eps());
}

template <size_t D, typename Derived>
void QuantBatchNormImpl<D, Derived>::pretty_print(std::ostream& stream) const {
  print_as_ours(stream,
                [&](std::ostream& text) { torch::nn::BatchNormImplBase<D, Derived>::pretty_print(text); });
}

template class QuantBatchNormImpl<1, QuantBatchNorm1dImpl>;
template class QuantBatchNormImpl<2, QuantBatchNorm2dImpl>;

void QuantBatchNorm1dImpl::_check_input_dim(const at::Tensor& input) {
  check_dim(input, input.dim() == 2 || input.dim() == 3, "QuantBatchNorm1d", "2 or 3");
}

void QuantBatchNorm2dImpl::_check_input_dim(const at::Tensor& input) {
  check_dim(input, input.dim() == 4, "QuantBatchNorm2d", "4");
}

}  // namespace torchqat::nn
