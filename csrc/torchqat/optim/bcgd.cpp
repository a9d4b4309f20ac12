#include "torchqat/optim/bcgd.h"

#include <ATen/ATen.h>
#include <torch/utils.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "torchqat/optim/checks.h"
#include "torchqat/optim/latents.h"

namespace torchqat::optim {
namespace {

using torch::optim::OptimizerParamGroup;

// The group with all options: what it says, and the rest as the optimizer has it.
OptimizerParamGroup completed(const ParamGroup& group, const BCGDOptions& defaults) {
  auto options = std::make_unique<BCGDOptions>(defaults);
  options->name(group.name)
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
  return {group.params, std::move(options)};
}

}  // namespace

BCGD::BCGD(const std::vector<ParamGroup>& param_groups, const BCGDOptions& defaults)
    : Optimizer(std::vector<OptimizerParamGroup>{}, std::make_unique<BCGDOptions>(defaults)) {
  check_options(defaults);
  const BCGDOptions none(0);
  TORCH_CHECK_VALUE(!defaults.min_value() && quantization(defaults) == quantization(none),
                    "BCGD: the options of all ParamGroups must say nothing of quantization, got ",
                    quantization(defaults), "; give it to a group");
  std::vector<OptimizerParamGroup> groups;
  for (const auto& group : param_groups) groups.push_back(completed(group, defaults));
  add(groups);
}

BCGD::BCGD(const std::vector<OptimizerParamGroup>& param_groups, const BCGDOptions& defaults)
    : Optimizer(std::vector<OptimizerParamGroup>{}, std::make_unique<BCGDOptions>(defaults)) {
  check_options(defaults);
  add(param_groups);
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
  add({completed(group, static_cast<const BCGDOptions&>(defaults()))});
}

void BCGD::add_param_group(const OptimizerParamGroup& group) { add({group}); }

// All of them or none: where one is refused, every parameter has its values back.
void BCGD::add(const std::vector<OptimizerParamGroup>& groups) {
  const torch::NoGradGuard no_grad;
  const size_t group_count = param_groups_.size();
  const size_t start_count = starts_quantized_.size();
  try {
    for (const auto& group : groups) {
      const auto options =
          group.has_options() ? options_of(group) : static_cast<const BCGDOptions&>(defaults());
      check_group(options, group.params(), param_groups_);
      Optimizer::add_param_group(group);
      // torch 2.13 and newer drop options of classes that they do not know.
      param_groups_.back().set_options(std::make_unique<BCGDOptions>(options));
    }
    const auto items = quantized(group_count);
    adopt(items);
    for (const auto& [p, options] : items) {
      if (was_quantized(p, state_of(p), *options)) starts_quantized_.push_back(p);
    }
  } catch (...) {
    for (const auto& [p, options] : quantized(group_count)) {
      if (left_.erase(p.unsafeGetTensorImpl())) at::Tensor(p).copy_(latent(p));
      state_.erase(p.unsafeGetTensorImpl());  // else it could not be added again
    }
    starts_quantized_.resize(start_count);
    while (param_groups_.size() > group_count) param_groups_.pop_back();
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

// The parameters of groups with quant_bits, from group `first` on.
std::vector<BCGD::Item> BCGD::quantized(size_t first) const {
  std::vector<Item> items;
  for (size_t i = first; i < param_groups_.size(); ++i) {
    const auto& options = options_of(param_groups_[i]);
    if (!options.quant_bits()) continue;
    for (const auto& p : param_groups_[i].params()) items.push_back({p, &options});
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

}  // namespace torchqat::optim
