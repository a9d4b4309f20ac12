#pragma once

#include <ATen/core/Generator.h>
#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>
#include <torch/serialize/archive.h>

#include <memory>
#include <optional>
#include <ostream>
#include <string>

#include "torchqat/macros.h"

namespace torchqat::nn {

struct TORCHQAT_API FeatureAffinityLossOptions {
  TORCH_ARG(std::string, norm) = "l1";         // or "fro"
  TORCH_ARG(std::string, reduction) = "mean";  // over the batch, or "sum"
  TORCH_ARG(double, eps) = 1e-5;               // added to the norms of columns
};

// torchqat::feature_affinity_loss as a module.
class TORCHQAT_API FeatureAffinityLossImpl : public torch::nn::Cloneable<FeatureAffinityLossImpl> {
 public:
  explicit FeatureAffinityLossImpl(FeatureAffinityLossOptions options = {});

  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  // Features (batch, channels, *spatial), of channels of their own; the loss is 0-dim.
  at::Tensor forward(const at::Tensor& student, const at::Tensor& teacher);

  FeatureAffinityLossOptions options;
};
TORCH_MODULE(FeatureAffinityLoss);

struct TORCHQAT_API FastFeatureAffinityLossOptions {
  TORCH_ARG(int64_t, probes) = 15;
  TORCH_ARG(std::optional<at::Generator>, generator) = std::nullopt;  // else one on the CPU, of seed 0
  TORCH_ARG(std::string, norm) = "l1";
  TORCH_ARG(std::string, reduction) = "mean";
  TORCH_ARG(double, eps) = 1e-5;
  TORCH_ARG(std::string, distribution) = "gaussian";  // or "rademacher"
};

// torchqat::fast_feature_affinity_loss with probes that are drawn anew at each call, from a generator of its
// own: the same numbers as in Python. The generator's state is saved and loaded with the module, and a clone
// goes on with a copy of it. A CUDA graph needs a generator on the GPU.
class TORCHQAT_API FastFeatureAffinityLossImpl : public torch::nn::Cloneable<FastFeatureAffinityLossImpl> {
 public:
  explicit FastFeatureAffinityLossImpl(FastFeatureAffinityLossOptions options = {});

  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<torch::Device>& device = std::nullopt) const override;
  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;
  at::Tensor forward(const at::Tensor& student, const at::Tensor& teacher);
  // The next probes, (pixels, k), on a device.
  at::Tensor draw(int64_t pixels, at::Device device, at::ScalarType dtype = at::kFloat);

  FastFeatureAffinityLossOptions options;
  at::Generator generator;
};
TORCH_MODULE(FastFeatureAffinityLoss);

}  // namespace torchqat::nn
