#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>
#include <torch/serialize/archive.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <variant>

#include "torchqat/macros.h"

namespace torchqat::nn {

// Where a step size starts: "optimal", of least mean squared error for standard normal input; "papers", what
// BCGD's authors start from (bits 1, 2 and 4); or a number.
struct AlphaInit : std::variant<std::string, double> {
  AlphaInit(const char* name) : variant(std::string(name)) {}
  AlphaInit(std::string name) : variant(std::move(name)) {}
  AlphaInit(double alpha) : variant(alpha) {}
};

struct TORCHQAT_API StaircaseReLUOptions {
  StaircaseReLUOptions() = default;
  StaircaseReLUOptions(int64_t bits) : bits_(bits) {}

  TORCH_ARG(int64_t, bits) = 4;                                // of the activation codes, 1 to 8
  TORCH_ARG(std::string, ste) = "clipped_relu";                // one of torchqat::ste_names()
  TORCH_ARG(std::string, alpha_grad) = "three_valued";         // or "exact", "min", "pact"
  TORCH_ARG(std::optional<int64_t>, channels) = std::nullopt;  // a step size for each, along dimension 1
  TORCH_ARG(AlphaInit, alpha_init) = "optimal";
  TORCH_ARG(double, alpha_grad_scale) = 0.01;  // what the gradient of alpha is multiplied by,
  TORCH_ARG(double, alpha_grad_clip) = 1.0;    // and then clamped to; infinity for no bound
  TORCH_ARG(double, alpha_min) = 1e-3;         // the least step size that forward uses
  TORCH_ARG(bool, save_codes) = true;  // keep packed codes for backward, which QuantConv2d and its like share
};

// torchqat::staircase_relu with its own learnable step size `alpha`, of shape [] or [channels]. Forward never
// writes alpha; optim::BCGD clamps it to alpha_min after its step, in groups of optim::param_groups.
// A saved state remembers bits, ste and alpha_grad: load() into a module of others is an error.
class TORCHQAT_API StaircaseReLUImpl : public torch::nn::Cloneable<StaircaseReLUImpl> {
 public:
  explicit StaircaseReLUImpl(StaircaseReLUOptions options = {});

  void reset() override;
  void pretty_print(std::ostream& stream) const override;
  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;
  // Any shape; with channels, dimension 1 has that size. The result has x's shape and dtype.
  at::Tensor forward(const at::Tensor& x);
  // What forward uses: alpha, not less than alpha_min, with its gradient scaled and clipped.
  at::Tensor step_size() const;
  // What a state must have been trained with to fit, as text.
  std::string settings() const;

  StaircaseReLUOptions options;
  at::Tensor alpha;
  // While it is set, forward shows it x and acts as a plain ReLU; what torchqat::calibrate uses.
  std::function<void(const at::Tensor&)> observer;
};
TORCH_MODULE(StaircaseReLU);

}  // namespace torchqat::nn
