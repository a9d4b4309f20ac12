#pragma once

#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/pooling.h>
#include <torch/nn/pimpl.h>

#include <cstddef>
#include <memory>
#include <optional>
#include <ostream>

#include "torchqat/macros.h"

// torch's layers that keep the packed codes of a staircase for backward in place of its output: the same
// options, parameters, results and gradients, bit by bit. Where the input comes from a StaircaseReLU (views
// and QuantMaxPool2d may lie between) is found out at each call; with any other input they are the plain
// layers. What writes into an activation behind autograd's back, through data pointers, is not seen.
// They are classes of their own: as<torch::nn::Conv2d>() finds none of them, but for QuantLinear, which is a
// torch::nn::Linear. (Each has its own forward: Sequential::at<Class> does not compile with an inherited
// one.)

namespace torchqat::nn {

// The base of the two classes below; the library has it for no others.
template <size_t D, typename Derived>
class TORCHQAT_API QuantConvNdImpl : public torch::nn::ConvNdImpl<D, Derived> {
 public:
  explicit QuantConvNdImpl(const torch::nn::ConvOptions<D>& options);
  at::Tensor forward(const at::Tensor& input);
  void pretty_print(std::ostream& stream) const override;

  // Whether QuantBatchNorm1d or 2d that reads the result has it computed again in backward, rather than keep
  // it.
  bool recompute = false;
};

class TORCHQAT_API QuantConv1dImpl : public QuantConvNdImpl<1, QuantConv1dImpl> {
 public:
  QuantConv1dImpl(int64_t in_channels, int64_t out_channels, torch::ExpandingArray<1> kernel_size)
      : QuantConv1dImpl(torch::nn::Conv1dOptions(in_channels, out_channels, kernel_size)) {}
  explicit QuantConv1dImpl(const torch::nn::Conv1dOptions& options) : QuantConvNdImpl(options) {}
  at::Tensor forward(const at::Tensor& input) { return QuantConvNdImpl::forward(input); }
};
TORCH_MODULE(QuantConv1d);

class TORCHQAT_API QuantConv2dImpl : public QuantConvNdImpl<2, QuantConv2dImpl> {
 public:
  QuantConv2dImpl(int64_t in_channels, int64_t out_channels, torch::ExpandingArray<2> kernel_size)
      : QuantConv2dImpl(torch::nn::Conv2dOptions(in_channels, out_channels, kernel_size)) {}
  explicit QuantConv2dImpl(const torch::nn::Conv2dOptions& options) : QuantConvNdImpl(options) {}
  at::Tensor forward(const at::Tensor& input) { return QuantConvNdImpl::forward(input); }
};
TORCH_MODULE(QuantConv2d);

class TORCHQAT_API QuantLinearImpl : public torch::nn::LinearImpl {
 public:
  using torch::nn::LinearImpl::LinearImpl;
  at::Tensor forward(const at::Tensor& input);
  void pretty_print(std::ostream& stream) const override;
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;
};
TORCH_MODULE(QuantLinear);

// Of an input on the steps of a staircase it keeps the places of the maxima alone.
class TORCHQAT_API QuantMaxPool2dImpl : public torch::nn::Cloneable<QuantMaxPool2dImpl> {
 public:
  QuantMaxPool2dImpl(torch::ExpandingArray<2> kernel_size)
      : QuantMaxPool2dImpl(torch::nn::MaxPool2dOptions(kernel_size)) {}
  explicit QuantMaxPool2dImpl(const torch::nn::MaxPool2dOptions& options) : options(options) {}
  void reset() override {}
  at::Tensor forward(const at::Tensor& input);
  void pretty_print(std::ostream& stream) const override;

  torch::nn::MaxPool2dOptions options;
};
TORCH_MODULE(QuantMaxPool2d);

// In training it does not keep an input that comes straight from a QuantConv1d or 2d with `recompute`:
// backward computes it again. The base of the two classes below; the library has it for no others.
template <size_t D, typename Derived>
class TORCHQAT_API QuantBatchNormImpl : public torch::nn::BatchNormImplBase<D, Derived> {
 public:
  using torch::nn::BatchNormImplBase<D, Derived>::BatchNormImplBase;
  at::Tensor forward(const at::Tensor& input);
  void pretty_print(std::ostream& stream) const override;
};

class TORCHQAT_API QuantBatchNorm1dImpl : public QuantBatchNormImpl<1, QuantBatchNorm1dImpl> {
 public:
  using QuantBatchNormImpl::QuantBatchNormImpl;
  at::Tensor forward(const at::Tensor& input) { return QuantBatchNormImpl::forward(input); }

 protected:
  void _check_input_dim(const at::Tensor& input) override;
};
TORCH_MODULE(QuantBatchNorm1d);

class TORCHQAT_API QuantBatchNorm2dImpl : public QuantBatchNormImpl<2, QuantBatchNorm2dImpl> {
 public:
  using QuantBatchNormImpl::QuantBatchNormImpl;
  at::Tensor forward(const at::Tensor& input) { return QuantBatchNormImpl::forward(input); }

 protected:
  void _check_input_dim(const at::Tensor& input) override;
};
TORCH_MODULE(QuantBatchNorm2d);

}  // namespace torchqat::nn
