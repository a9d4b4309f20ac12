#include "torchqat/optim/bcgd.h"

#include <ATen/ATen.h>
#include <torch/utils.h>

#include <map>
#include <memory>
#include <string>

#include "torchqat/ops/bcgd_step.h"
#include "torchqat/optim/checks.h"
#include "torchqat/optim/latents.h"

namespace torchqat::optim {
namespace {

using torch::optim::OptimizerParamGroup;

// All options of a group: what it says, and the rest as the optimizer has it.
BCGDOptions completed(const ParamGroup& group, const BCGDOptions& defaults) {
  auto options = defaults;
  options.name(group.name)
      .quant_bits(group.quant_bits)
      .channel_dim(group.channel_dim)
      .method(group.method)
      .min_value(group.min_value)
      .lr(group.lr.value_or(defaults.lr()))
      .momentum(group.momentum.value_or(defaults.momentum()))
      .dampening(group.dampening.value_or(defaults.dampening()))
      .weight_decay(group.weight_decay.value_or(defaults.weight_decay()))
      .nesterov(group.nesterov.value_or(defaults.nesterov()))
      .blend(group.blend.value_or(defaults.blend()))
      .maximize(group.maximize.value_or(defaults.maximize()));
  return options;
}

}  // namespace

BCGD::BCGD(const std::vector<ParamGroup>& param_groups, const BCGDOptions& defaults)
    : Optimizer(std::vector<OptimizerParamGroup>{}, std::make_unique<BCGDOptions>(defaults)) {
  check_options(defaults);
  const BCGDOptions none(0);
  TORCH_CHECK_VALUE(!defaults.min_value() && quantization(defaults) == quantization(none),
                    "BCGD: the options of all ParamGroups must say nothing of quantization, got ",
                    quantization(defaults), "; give it to a group");
  for (const auto& group : param_groups) add_param_group(group);
}

BCGD::BCGD(const std::vector<OptimizerParamGroup>& param_groups, const BCGDOptions& defaults)
    : Optimizer(std::vector<OptimizerParamGroup>{}, std::make_unique<BCGDOptions>(defaults)) {
  check_options(defaults);
  for (const auto& group : param_groups) add_param_group(group);
  if (quantized().empty()) {
    TORCH_WARN(
        "BCGD: no group has quant_bits, so nothing is quantized: each step is that of torch::optim::SGD, and "
        "step sizes of StaircaseReLUs are not clamped to alpha_min. Make groups with "
        "torchqat::optim::param_groups(model, weight_bits).");
  }
}

BCGD::BCGD(std::vector<at::Tensor> params, const BCGDOptions& defaults)
    : BCGD(std::vector<OptimizerParamGroup>{OptimizerParamGroup(std::move(params))}, defaults) {}

void BCGD::add_param_group(const ParamGroup& group) {
  const auto& defaults = static_cast<const BCGDOptions&>(this->defaults());
  add_param_group(
      OptimizerParamGroup(group.params, std::make_unique<BCGDOptions>(completed(group, defaults))));
}

void BCGD::add_param_group(const OptimizerParamGroup& group) {
  const auto options =
      group.has_options() ? options_of(group) : static_cast<const BCGDOptions&>(this->defaults());
  check_group(options, group.params(), param_groups_);
  Optimizer::add_param_group(group);
  auto& added = param_groups_.back();
  // torch 2.13 and newer drop options of classes that they do not know.
  added.set_options(std::make_unique<BCGDOptions>(options));
  if (!options.quant_bits()) return;
  std::vector<Item> items;
  for (const auto& p : added.params()) items.push_back({p, &options_of(added)});
  try {
    adopt(items);
    for (const auto& [p, o] : items) {
      if (was_quantized(p, state_of(p), *o)) starts_quantized_.push_back(p);
    }
  } catch (...) {
    for (const auto& p : added.params())
      state_.erase(p.unsafeGetTensorImpl());  // else they could not be added again
    param_groups_.pop_back();
    throw;
  }
}

BCGDParamState& BCGD::state_of(const at::Tensor& param) {
  auto& state = state_[param.unsafeGetTensorImpl()];
  if (!state) state = std::make_unique<BCGDParamState>();
  return static_cast<BCGDParamState&>(*state);
}

const at::Tensor& BCGD::latent(const at::Tensor& param) const {
  TORCH_CHECK_VALUE(has_latent(param),
                    "BCGD: latent is for parameters of groups with quant_bits, got another");
  return static_cast<const BCGDParamState&>(*state_.find(param.unsafeGetTensorImpl())->second).latent();
}

bool BCGD::has_latent(const at::Tensor& param) const {
  const auto found = state_.find(param.unsafeGetTensorImpl());
  return found != state_.end() && static_cast<const BCGDParamState&>(*found->second).latent().defined();
}

std::vector<BCGD::Item> BCGD::quantized() const {
  std::vector<Item> items;
  for (const auto& group : param_groups_) {
    const auto& options = options_of(group);
    if (!options.quant_bits()) continue;
    for (const auto& p : group.params()) items.push_back({p, &options});
  }
  return items;
}

void BCGD::leave(const at::Tensor& param) {
  left_[param.unsafeGetTensorImpl()] = {static_cast<uint32_t>(param._version()), param.const_data_ptr()};
}

// Those of the parameters that do not hold the projection of their latent.
std::vector<BCGD::Item> BCGD::changed(const std::vector<Item>& items) {
  std::vector<Item> found;
  for (const auto& item : items) {
    const auto& p = item.param;
    if (!has_latent(p)) {
      found.push_back(item);
      continue;
    }
    auto& state = state_of(p);
    const auto now = std::pair(static_cast<uint32_t>(p._version()), p.const_data_ptr());
    const auto left = left_.find(p.unsafeGetTensorImpl());
    if (left != left_.end() && left->second == now) continue;
    fit_to(p, state);
    if (holds_projection(p, state, *item.options))
      leave(p);
    else
      found.push_back(item);
  }
  return found;
}

// Makes the values of these parameters their latents, and quantizes the parameters.
void BCGD::adopt(const std::vector<Item>& items, bool warn) {
  const torch::NoGradGuard no_grad;
  std::vector<at::Tensor> lost;
  for (const auto& [p, options] : items) {
    if (has_latent(p)) lost.push_back(p);
  }
  if (warn && !lost.empty() && !warned_) {
    TORCH_WARN(
        "BCGD: ", lost.size(), " parameter(s) changed outside the optimizer, the first of shape ",
        lost[0].sizes(),
        ": their float latents are dropped and start again from the new values. Load a checkpoint into "
        "both model and optimizer to go on with its latents. (Warned of once.)");
    warned_ = true;
  }
  // All projections before any change: a bad option throws with nothing done.
  std::vector<NewLatent> fresh;
  for (const auto& [p, options] : items) fresh.push_back(new_latent(p, *options));
  for (size_t i = 0; i < items.size(); ++i) {
    const auto& [p, options] = items[i];
    auto& state = state_of(p);
    state.latent(fresh[i].latent).scale(fresh[i].scale);
    if (options->momentum() != 0 && !state.step().defined()) add_momentum(p, state);
    at::Tensor(p).copy_(fresh[i].projection);
    leave(p);
  }
}

void BCGD::refresh() {
  refuse_swapped("refresh");
  left_.clear();
  adopt(changed(quantized()), /*warn=*/false);
}

void BCGD::refuse_swapped(const std::string& what) const {
  TORCH_CHECK(!swapped_, "BCGD: ", what,
              " must not be called while latents() lives: the parameters hold latents");
}

void BCGD::warn_of_quantized_starts() {
  if (starts_quantized_.empty()) return;
  TORCH_WARN("BCGD: ", starts_quantized_.size(), " parameter(s), the first of shape ",
             starts_quantized_[0].sizes(),
             ", held quantized values when this optimizer was made: their float latents start from those. If "
             "an earlier BCGD quantized them, its latents are not used. Go on with that optimizer, load its "
             "state into this one, or copy its latent(p) into each parameter p before this one is made.");
  starts_quantized_.clear();
}

BCGD::Latents::Latents(BCGD& optimizer) : optimizer_(optimizer) {
  const torch::NoGradGuard no_grad;
  optimizer.refuse_swapped("latents");
  const auto items = optimizer.quantized();
  optimizer.adopt(optimizer.changed(items));
  for (const auto& item : items) held_.emplace_back(item.param, item.param.detach().clone());
  optimizer.swapped_ = true;
  try {
    for (auto& [p, w] : held_) p.copy_(optimizer.latent(p));
  } catch (...) {
    give_back();
    throw;
  }
}

BCGD::Latents::~Latents() { give_back(); }

void BCGD::Latents::give_back() {
  const torch::NoGradGuard no_grad;
  for (auto& [p, w] : held_) {
    p.copy_(w);
    optimizer_.leave(p);
  }
  optimizer_.swapped_ = false;
}

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
