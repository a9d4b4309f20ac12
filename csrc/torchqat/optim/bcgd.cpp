#include "torchqat/optim/bcgd.h"

#include <ATen/ATen.h>
#include <torch/utils.h>

#include <cmath>
#include <map>
#include <memory>
#include <sstream>

#include "torchqat/ops/bcgd_step.h"
#include "torchqat/optim/latents.h"

namespace torchqat::optim {
namespace {

using torch::optim::OptimizerParamGroup;

const BCGDOptions& options_of(const OptimizerParamGroup& group) {
  const auto* options = dynamic_cast<const BCGDOptions*>(&group.options());
  TORCH_CHECK_TYPE(options, "BCGD: the options of a group must be BCGDOptions");
  return *options;
}

void check_options(const BCGDOptions& o) {
  const auto at_least_0 = [](const char* name, double value) {
    TORCH_CHECK_VALUE(value >= 0, "BCGD: ", name, " must be at least 0, got ", value);
  };
  at_least_0("lr", o.lr());
  at_least_0("momentum", o.momentum());
  at_least_0("weight_decay", o.weight_decay());
  TORCH_CHECK_VALUE(o.blend() >= 0 && o.blend() <= 1, "BCGD: blend must be in 0..1, got ", o.blend());
  TORCH_CHECK_VALUE(!o.nesterov() || (o.momentum() > 0 && o.dampening() == 0),
                    "BCGD: Nesterov momentum requires a momentum and zero dampening");
}

void check_group(const BCGDOptions& o, const std::vector<at::Tensor>& params) {
  check_options(o);
  for (const auto& p : params)
    TORCH_CHECK_VALUE(p.defined() && p.is_leaf(), "BCGD: parameters must be leaf tensors, got ",
                      p.defined() ? "another" : "an undefined one");
  if (!o.quant_bits()) return;
  TORCH_CHECK_VALUE(*o.quant_bits() >= 1 && *o.quant_bits() <= 8, "BCGD: quant_bits must be in 1..8, got ",
                    *o.quant_bits());
  TORCH_CHECK_VALUE(!o.min_value(), "BCGD: min_value is for groups without quant_bits");
  for (const auto& p : params)
    TORCH_CHECK_TYPE(p.is_floating_point(),
                     "BCGD: parameters of a group with quant_bits must be floating point, got ",
                     p.scalar_type());
}

// All options of a group: what it says, and the rest as the optimizer has it.
BCGDOptions completed(const ParamGroup& group, const BCGDOptions& defaults) {
  auto options = defaults;
  options.name(group.name)
      .quant_bits(group.quant_bits)
      .channel_dim(group.channel_dim)
      .method(group.method)
      .min_value(group.min_value)
      .lr(group.lr.value_or(defaults.lr()))
      .weight_decay(group.weight_decay.value_or(defaults.weight_decay()));
  return options;
}

template <typename T>
std::string shown(const std::optional<T>& value) {
  return value ? c10::str(*value) : "None";
}

// What a saved state must have been quantized as to fit.
std::string quantization(const BCGDOptions& o) {
  return c10::str("quant_bits=", shown(o.quant_bits()), ", channel_dim=", shown(o.channel_dim()),
                  ", method=", o.method());
}

// What torch's own loading writes into: groups of as many parameters as an optimizer's.
struct SavedOptimizer : torch::optim::Optimizer {
  SavedOptimizer(const std::vector<OptimizerParamGroup>& groups,
                 const torch::optim::OptimizerOptions& defaults)
      : Optimizer(std::vector<OptimizerParamGroup>{}, defaults.clone()) {
    for (const auto& group : groups) {
      std::vector<at::Tensor> stand_ins;
      for (size_t i = 0; i < group.params().size(); ++i) stand_ins.push_back(at::empty({0}));
      add_param_group(OptimizerParamGroup(std::move(stand_ins)));
    }
  }
  at::Tensor step(LossClosure) override { return {}; }
};

}  // namespace

// ------------------------------------------------------------------------------------ options and state

double BCGDOptions::get_lr() const { return lr(); }

void BCGDOptions::set_lr(double lr) { this->lr(lr); }

void BCGDOptions::serialize(torch::serialize::OutputArchive& archive) const {
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(lr);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(momentum);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(dampening);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(weight_decay);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(nesterov);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(blend);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(maximize);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(quant_bits);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(channel_dim);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(method);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(min_value);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(name);
}

void BCGDOptions::serialize(torch::serialize::InputArchive& archive) {
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, lr);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, momentum);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, dampening);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, weight_decay);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(bool, nesterov);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(double, blend);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(bool, maximize);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG_OPTIONAL(int64_t, quant_bits);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG_OPTIONAL(int64_t, channel_dim);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(std::string, method);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG_OPTIONAL(double, min_value);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(std::string, name);
}

void BCGDParamState::serialize(torch::serialize::OutputArchive& archive) const {
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(latent);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(scale);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(momentum_buffer);
  _TORCH_OPTIM_SERIALIZE_TORCH_ARG(step);
}

void BCGDParamState::serialize(torch::serialize::InputArchive& archive) {
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(at::Tensor, latent);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(at::Tensor, scale);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(at::Tensor, momentum_buffer);
  _TORCH_OPTIM_DESERIALIZE_TORCH_ARG(at::Tensor, step);
}

// ---------------------------------------------------------------------------------- making the optimizer

BCGD::BCGD(const std::vector<ParamGroup>& param_groups, const BCGDOptions& defaults)
    : Optimizer(std::vector<OptimizerParamGroup>{}, std::make_unique<BCGDOptions>(defaults)) {
  check_options(defaults);
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
  check_group(options, group.params());
  Optimizer::add_param_group(group);
  auto& added = param_groups_.back();
  // torch 2.13 and newer drop options of classes that they do not know.
  added.set_options(std::make_unique<BCGDOptions>(options));
  if (!options.quant_bits()) return;
  std::vector<Item> items;
  for (const auto& p : added.params()) items.push_back({p, &options_of(added)});
  try {
    adopt(items);
  } catch (...) {
    // With a state they could not be added again.
    for (const auto& p : added.params()) state_.erase(p.unsafeGetTensorImpl());
    param_groups_.pop_back();
    throw;
  }
  for (const auto& [p, o] : items) {
    if (was_quantized(p, state_of(p), *o)) starts_quantized_.push_back(p);
  }
}

BCGDParamState& BCGD::state_of(const at::Tensor& param) {
  auto& state = state_[param.unsafeGetTensorImpl()];
  if (!state) state = std::make_unique<BCGDParamState>();
  return static_cast<BCGDParamState&>(*state);
}

const at::Tensor& BCGD::latent(const at::Tensor& param) const {
  const auto found = state_.find(param.unsafeGetTensorImpl());
  const auto* state =
      found == state_.end() ? nullptr : static_cast<const BCGDParamState*>(found->second.get());
  TORCH_CHECK_VALUE(state && state->latent().defined(),
                    "BCGD: latent is for parameters of groups with quant_bits, got another");
  return state->latent();
}

// ---------------------------------------------------------------------------------- changes from outside

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
    auto& state = state_of(p);
    if (!state.latent().defined()) {
      found.push_back(item);
      continue;
    }
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
  size_t lost = 0;
  for (const auto& item : items) lost += state_of(item.param).latent().defined();
  if (warn && lost && !warned_) {
    TORCH_WARN("BCGD: ", lost,
               " parameter(s) changed outside the optimizer: their float latents are dropped and start again "
               "from the new values. Load a checkpoint into both model and optimizer to go on with its "
               "latents. (Warned of once.)");
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

void BCGD::refuse_swapped(const char* what) const {
  TORCH_CHECK(!swapped_, "BCGD: ", what,
              " must not be called while latents() lives: the parameters hold latents");
}

void BCGD::warn_of_quantized_starts() {
  if (starts_quantized_.empty()) return;
  TORCH_WARN("BCGD: ", starts_quantized_.size(),
             " parameter(s) held quantized values when this optimizer was made: their float latents start "
             "from those. If an earlier BCGD quantized them, its latents are not used. Go on with that "
             "optimizer, or load its state into this one.");
  starts_quantized_.clear();
}

BCGD::Latents::Latents(BCGD& optimizer) : optimizer_(optimizer) {
  const torch::NoGradGuard no_grad;
  optimizer.refuse_swapped("latents");
  const auto items = optimizer.quantized();
  optimizer.adopt(optimizer.changed(items));
  for (const auto& item : items) held_.emplace_back(item.param, item.param.detach().clone());
  optimizer.swapped_ = true;
  for (auto& [p, w] : held_) p.copy_(optimizer.latent(p));
}

BCGD::Latents::~Latents() {
  const torch::NoGradGuard no_grad;
  for (auto& [p, w] : held_) {
    p.copy_(w);
    optimizer_.leave(p);
  }
  optimizer_.swapped_ = false;
}

// ------------------------------------------------------------------------------------------------- steps

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

// ------------------------------------------------------------------------------------------- checkpoints

void BCGD::save(torch::serialize::OutputArchive& archive) const {
  torch::optim::serialize<BCGDParamState, BCGDOptions>(archive, *this);
}

void BCGD::load(torch::serialize::InputArchive& archive) {
  refuse_swapped("load");
  SavedOptimizer saved(param_groups_, defaults());
  try {
    torch::optim::serialize<BCGDParamState, BCGDOptions>(archive, saved);
  } catch (const c10::Error& error) {
    TORCH_CHECK_VALUE(false, "BCGD: load: the archive must be of a BCGD with the same groups: ",
                      error.what_without_backtrace());
  }
  std::vector<BCGDParamState> states;
  for (size_t i = 0; i < param_groups_.size(); ++i) {
    const auto& ours = options_of(param_groups_[i]);
    const auto& theirs = options_of(saved.param_groups()[i]);
    TORCH_CHECK_VALUE(
        (!ours.quant_bits() && !theirs.quant_bits()) || quantization(ours) == quantization(theirs),
        "BCGD: group ", i, " of the archive must be quantized as ", quantization(ours), ", got ",
        quantization(theirs));
    for (const auto& p : saved.param_groups()[i].params()) {
      const auto state = saved.state().find(p.unsafeGetTensorImpl());
      states.push_back(state == saved.state().end() ? BCGDParamState()
                                                    : static_cast<const BCGDParamState&>(*state->second));
    }
  }
  restore(states);
  for (size_t i = 0; i < param_groups_.size(); ++i)
    static_cast<BCGDOptions&>(param_groups_[i].options()) = options_of(saved.param_groups()[i]);
}

void BCGD::check_states(const std::vector<BCGDParamState>& states) const {
  size_t count = 0;
  for (const auto& group : param_groups_) count += group.params().size();
  TORCH_CHECK_VALUE(states.size() == count, "BCGD: there must be ", count, " states, got ",
                    states.size());
  size_t number = 0;
  for (const auto& group : param_groups_) {
    const auto& options = options_of(group);
    for (const auto& p : group.params()) {
      const auto& state = states[number];
      const auto fits = [&](const char* key, const at::Tensor& value, at::IntArrayRef shape) {
        TORCH_CHECK_VALUE(!value.defined() || value.sizes() == shape, "BCGD: ", key, " of parameter ", number,
                          " in the state must have shape ", shape, ", got ", value.sizes(),
                          ": another model's?");
      };
      std::vector<int64_t> channels;
      if (options.quant_bits()) {
        TORCH_CHECK_VALUE(state.latent().defined() && state.scale().defined(),
                          "BCGD: the state has no latent and scale for parameter ", number,
                          ", which is quantized");
        TORCH_CHECK_VALUE(state.momentum_buffer().defined() == state.step().defined(),
                          "BCGD: the state has only one of momentum_buffer and step for parameter ", number);
        if (options.channel_dim()) channels.push_back(p.size(*options.channel_dim()));
      }
      fits("latent", state.latent(), p.sizes());
      fits("momentum_buffer", state.momentum_buffer(), p.sizes());
      fits("scale", state.scale(), channels);
      fits("step", state.step(), {});
      ++number;
    }
  }
}

void BCGD::restore(const std::vector<BCGDParamState>& states) {
  const torch::NoGradGuard no_grad;
  refuse_swapped("restore");
  check_states(states);
  starts_quantized_.clear();
  auto saved = states.begin();
  for (const auto& group : param_groups_) {
    const auto& options = options_of(group);
    for (auto p : group.params()) {
      auto& state = state_of(p) = restored(p, *saved++);
      if (!options.quant_bits()) {
        // As before a first step.
        if (!state.momentum_buffer().defined()) state_.erase(p.unsafeGetTensorImpl());
        continue;
      }
      if (!holds_projection(p, state, options)) p.copy_(projection(state, options));
      leave(p);
    }
  }
}

}  // namespace torchqat::optim
