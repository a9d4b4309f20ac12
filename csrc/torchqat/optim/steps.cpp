// The steps of BCGD.
#include <ATen/ATen.h>
#include <torch/utils.h>

#include <map>
#include <string>
#include <vector>

#include "torchqat/ops/bcgd_step.h"
#include "torchqat/optim/bcgd.h"
#include "torchqat/optim/checks.h"
#include "torchqat/optim/latents.h"

namespace torchqat::optim {

at::Tensor BCGD::step(LossClosure closure) {
  const torch::NoGradGuard no_grad;
  refuse_swapped("step");
  at::Tensor loss;
  if (closure) {
    const at::AutoGradMode with_grad(true);
    loss = closure();
  }
  warn_of_quantized_starts();
  std::vector<Item> items;
  for (const auto& item : quantized()) {
    const auto& grad = item.param.grad();
    if (!grad.defined()) continue;
    TORCH_CHECK(!grad.is_sparse(),
                "BCGD: gradients in a group with quant_bits must be dense, got a sparse one");
    items.push_back(item);
  }
  adopt(changed(items));
  // Quantized groups first, as in Python.
  for (const bool quantized : {true, false}) {
    for (const auto& group : param_groups_) {
      const auto& options = options_of(group);
      std::vector<at::Tensor> params;
      for (const auto& p : group.params()) {
        if (p.grad().defined()) params.push_back(p);
      }
      if (params.empty() || options.quant_bits().has_value() != quantized) continue;
      if (quantized)
        quantized_step(options, params);
      else
        plain_step(options, params);
    }
  }
  return loss;
}

// The step of torch::optim::SGD, then the clamp to `min_value`.
void BCGD::plain_step(const BCGDOptions& o, const std::vector<at::Tensor>& params) {
  for (auto p : params) {
    auto grad = o.maximize() ? p.grad().neg() : p.grad();
    if (o.weight_decay() != 0) grad = grad.add(p, o.weight_decay());
    if (o.momentum() != 0) {
      auto& state = state_of(p);
      if (state.momentum_buffer().defined())
        state.momentum_buffer().mul_(o.momentum()).add_(grad, 1 - o.dampening());
      else
        state.momentum_buffer(grad.detach().clone());
      grad = o.nesterov() ? grad.add(state.momentum_buffer(), o.momentum()) : state.momentum_buffer();
    }
    p.add_(grad, -o.lr());
    if (o.min_value()) p.clamp_min_(*o.min_value());
  }
}

// One call of bcgd_step_ for each device among the parameters, whatever their dtypes.
void BCGD::quantized_step(const BCGDOptions& o, const std::vector<at::Tensor>& params) {
  struct Lists {
    std::vector<at::Tensor> params, grads, latents, scales, buffers, steps;
  };
  std::map<std::string, Lists> devices;
  for (const auto& p : params) {
    auto& state = state_of(p);
    auto& lists = devices[p.device().str()];
    lists.params.push_back(p);
    lists.grads.push_back(p.grad());
    lists.latents.push_back(state.latent());
    lists.scales.push_back(state.scale());
    if (o.momentum() != 0) {
      if (!state.step().defined()) add_momentum(p, state);
      lists.buffers.push_back(state.momentum_buffer());
      lists.steps.push_back(state.step());
    }
  }
  const auto lr = at::scalar_tensor(o.lr(), at::kDouble);
  for (const auto& [device, lists] : devices) {
    bcgd_step_(lists.params, lists.grads, lists.latents, lists.scales, lists.buffers, lists.steps, lr,
               *o.quant_bits(), o.channel_dim(), o.method(), o.momentum(), o.dampening(), o.weight_decay(),
               o.nesterov(), o.blend(), o.maximize());
  }
  for (const auto& p : params) leave(p);
}

}  // namespace torchqat::optim
