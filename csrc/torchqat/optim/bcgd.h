#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>
#include <torch/optim/optimizer.h>
#include <torch/serialize/archive.h>

#include <cstdint>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "torchqat/macros.h"

namespace torchqat::optim {

struct TORCHQAT_API BCGDOptions : public torch::optim::OptimizerCloneableOptions<BCGDOptions> {
  BCGDOptions(double lr) : lr_(lr) {}

  TORCH_ARG(double, lr);
  TORCH_ARG(double, momentum) = 0;
  TORCH_ARG(double, dampening) = 0;
  TORCH_ARG(double, weight_decay) = 0;
  TORCH_ARG(bool, nesterov) = false;
  TORCH_ARG(double, blend) = 1e-5;  // how far the latent is drawn to the quantized weight: rho
  TORCH_ARG(bool, maximize) = false;
  // Of a group. Without quant_bits it is a group of torch::optim::SGD.
  TORCH_ARG(std::optional<int64_t>, quant_bits) = std::nullopt;   // 1 to 8; 2 is ternary
  TORCH_ARG(std::optional<int64_t>, channel_dim) = std::nullopt;  // one scale per index of it
  TORCH_ARG(std::string, method) = "exact";                       // see quantize_weight
  // Without quant_bits: parameters are clamped to at least this after each step.
  TORCH_ARG(std::optional<double>, min_value) = std::nullopt;
  TORCH_ARG(std::string, name);

 public:
  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;
  double get_lr() const override;
  void set_lr(double lr) override;
};

// A group of parameters as Python has it. Rates and the like that are not said are the optimizer's; without
// quant_bits it is a plain group, and meant so: nothing warns of it.
struct ParamGroup {
  std::string name = {};
  std::vector<at::Tensor> params = {};
  std::optional<int64_t> quant_bits = std::nullopt;
  std::optional<int64_t> channel_dim = std::nullopt;
  std::string method = "exact";
  std::optional<double> min_value = std::nullopt;
  std::optional<double> lr = std::nullopt;
  std::optional<double> momentum = std::nullopt;
  std::optional<double> dampening = std::nullopt;
  std::optional<double> weight_decay = std::nullopt;
  std::optional<bool> nesterov = std::nullopt;
  std::optional<double> blend = std::nullopt;
  std::optional<bool> maximize = std::nullopt;
};

// Of a quantized parameter: `latent` (its shape), `scale` (0-dim or one per channel) and with momentum
// `momentum_buffer` and `step` (0-dim float32); the first three are float32 for half and bfloat16. Of others:
// `momentum_buffer`, with momentum.
struct TORCHQAT_API BCGDParamState : public torch::optim::OptimizerCloneableParamState<BCGDParamState> {
  TORCH_ARG(at::Tensor, latent);
  TORCH_ARG(at::Tensor, scale);
  TORCH_ARG(at::Tensor, momentum_buffer);
  TORCH_ARG(at::Tensor, step);

 public:
  void serialize(torch::serialize::InputArchive& archive) override;
  void serialize(torch::serialize::OutputArchive& archive) const override;
};

// Blended coarse gradient descent (Yin, Zhang, Lyu, Osher, Qi, Xin 2018, algorithm 1): parameters of groups
// with quant_bits hold quantized weights, the optimizer holds their float latents. The steps are those of
// torchqat.optim.BCGD in Python bit for bit, and so are the rules:
// - Parameters are quantized as soon as the optimizer is made or a group is added; where one is refused, none
//   is. (A group added through a
//   reference to torch::optim::Optimizer is quantized at its first step, and torch 2.13 and newer give it the
//   optimizer's options in place of its own.)
// - A parameter that was changed from outside gets a new latent, its new values, at its next step, with one
//   warning per optimizer. Writes through data pointers are not seen: call refresh() after them.
// - Checkpoints: save model and optimizer; after load() the parameters hold the projections of the latents.
//   When load() throws, nothing has changed.
// Groups without quant_bits take the step of torch::optim::SGD, bit for bit. (That is also Python's, but for
// half and bfloat16 parameters with momentum: LibTorch rounds the factor to their dtype first.)
class TORCHQAT_API BCGD : public torch::optim::Optimizer {
 public:
  // `defaults` say nothing of quantization then: the groups do.
  BCGD(const std::vector<ParamGroup>& param_groups, const BCGDOptions& defaults);
  // Groups with options of their own, which are then complete BCGDOptions.
  BCGD(const std::vector<torch::optim::OptimizerParamGroup>& param_groups, const BCGDOptions& defaults);
  BCGD(std::vector<at::Tensor> params, const BCGDOptions& defaults);

  // One step with every parameter that has a gradient. `closure` evaluates the model anew and returns the
  // loss.
  at::Tensor step(LossClosure closure = nullptr) override;
  void add_param_group(const ParamGroup& group);
  void add_param_group(const torch::optim::OptimizerParamGroup& group);
  void save(torch::serialize::OutputArchive& archive) const override;
  void load(torch::serialize::InputArchive& archive) override;

  // The float latent of a quantized parameter: the optimizer's own tensor.
  const at::Tensor& latent(const at::Tensor& param) const;

  // While it lives, the quantized parameters hold their latents; then each gets back what it held. The
  // optimizer must stay where it is.
  class TORCHQAT_API Latents {
   public:
    explicit Latents(BCGD& optimizer);
    Latents(const Latents&) = delete;
    Latents& operator=(const Latents&) = delete;
    ~Latents();

   private:
    void give_back();
    BCGD& optimizer_;
    std::vector<std::pair<at::Tensor, at::Tensor>> held_;  // the parameter, its values
  };
  [[nodiscard]] Latents latents() { return Latents(*this); }

  // Compares every quantized parameter with its latent and gives those that differ a new one, silently.
  void refresh();

  // For other formats of files than LibTorch's. Takes over states, one for each parameter in the order of the
  // groups; the parameters then hold the projections of the latents. Throws with nothing changed.
  void restore(const std::vector<BCGDParamState>& states);
  // Throws where the states are not those of parameters like the optimizer's. `what` begins the message, and
  // names, where there are any, are what it calls the parameters.
  void check_states(const std::vector<BCGDParamState>& states, const std::string& what = "BCGD",
                    const std::vector<std::string>& names = {}) const;
  // Throws in the name of `what` while latents() lives.
  void refuse_swapped(const std::string& what) const;

 private:
  struct Item {
    at::Tensor param;
    const BCGDOptions* options;
  };
  void add(const std::vector<torch::optim::OptimizerParamGroup>& groups);
  BCGDParamState& state_of(const at::Tensor& param);
  bool has_latent(const at::Tensor& param) const;
  std::vector<Item> quantized(size_t first = 0) const;
  std::vector<Item> changed(const std::vector<Item>& items);
  void adopt(const std::vector<Item>& items, bool warn = true);
  void leave(const at::Tensor& param);
  void warn_of_quantized_starts();
  void plain_step(const BCGDOptions& options, const std::vector<at::Tensor>& params);
  void quantized_step(const BCGDOptions& options, const std::vector<at::Tensor>& params);

  // What the optimizer left of each parameter: version counter and address. A parameter without an entry has
  // its values compared.
  std::unordered_map<const void*, std::pair<uint32_t, const void*>> left_;
  std::vector<at::Tensor> starts_quantized_;  // when they were added; load() may still bring their latents
  bool warned_ = false;
  bool swapped_ = false;
};

}  // namespace torchqat::optim
