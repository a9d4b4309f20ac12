// What BCGD saves and loads.
#include <ATen/ATen.h>
#include <torch/optim/serialize.h>
#include <torch/utils.h>

#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "torchqat/optim/bcgd.h"
#include "torchqat/optim/checks.h"
#include "torchqat/optim/latents.h"

namespace torchqat::optim {
namespace {

using torch::optim::OptimizerParamGroup;

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

// The options of a group of an archive; those that are not in it, as of torch::optim::SGD's, are `own`.
BCGDOptions loaded_options(torch::serialize::InputArchive& archive, size_t number, const BCGDOptions& own) {
  torch::serialize::InputArchive groups, group, saved;
  archive.read("param_groups", groups);
  groups.read("param_groups/" + std::to_string(number), group);
  group.read("options", saved);
  auto options = own;
  options.serialize(saved);
  return options;
}

[[noreturn]] void refuse_archive(const char* reason) {
  C10_THROW_ERROR(ValueError,
                  c10::str("BCGD: load: the archive must be of a BCGD with the same groups: ", reason));
}

}  // namespace

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

// An option that is not in the archive stays.
void BCGDOptions::serialize(torch::serialize::InputArchive& archive) {
  const auto read = [&]<typename T>(const char* key, T& value) {
    c10::IValue saved;
    if (archive.try_read(key, saved)) value = saved.to<T>();
  };
  read("lr", lr());
  read("momentum", momentum());
  read("dampening", dampening());
  read("weight_decay", weight_decay());
  read("nesterov", nesterov());
  read("blend", blend());
  read("maximize", maximize());
  read("quant_bits", quant_bits());
  read("channel_dim", channel_dim());
  read("method", method());
  read("min_value", min_value());
  read("name", name());
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

void BCGD::save(torch::serialize::OutputArchive& archive) const {
  torch::optim::serialize<BCGDParamState, BCGDOptions>(archive, *this);
}

void BCGD::load(torch::serialize::InputArchive& archive) {
  refuse_swapped("load");
  SavedOptimizer saved(param_groups_, defaults());
  std::vector<BCGDOptions> options;
  try {
    torch::optim::serialize<BCGDParamState, BCGDOptions>(archive, saved);
    for (size_t i = 0; i < param_groups_.size(); ++i)
      options.push_back(loaded_options(archive, i, options_of(param_groups_[i])));
  } catch (const c10::Error& error) {
    refuse_archive(error.what_without_backtrace());
  } catch (const std::exception& error) {  // of a key that is no number
    refuse_archive(error.what());
  }
  std::vector<BCGDParamState> states;
  for (size_t i = 0; i < param_groups_.size(); ++i) {
    const auto& ours = options_of(param_groups_[i]);
    const auto& theirs = options_of(saved.param_groups()[i]);
    TORCH_CHECK_VALUE(
        (!ours.quant_bits() && !theirs.quant_bits()) || quantization(ours) == quantization(theirs),
        "BCGD: group ", i, " of the archive must be quantized as ", quantization(ours), ", got ",
        quantization(theirs));
    check_options(options[i], c10::str("BCGD: group ", i, " of the archive"));
    for (const auto& p : saved.param_groups()[i].params()) {
      const auto state = saved.state().find(p.unsafeGetTensorImpl());
      states.push_back(state == saved.state().end() ? BCGDParamState()
                                                    : static_cast<const BCGDParamState&>(*state->second));
    }
  }
  restore(states);
  for (size_t i = 0; i < param_groups_.size(); ++i)
    static_cast<BCGDOptions&>(param_groups_[i].options()) = std::move(options[i]);
}

void BCGD::check_states(const std::vector<BCGDParamState>& states, const std::string& what,
                        const std::vector<std::string>& names) const {
  size_t count = 0;
  for (const auto& group : param_groups_) count += group.params().size();
  TORCH_CHECK_VALUE(states.size() == count, what, ": there must be ", count, " states, got ", states.size());
  size_t number = 0;
  for (const auto& group : param_groups_) {
    const auto& options = options_of(group);
    for (const auto& p : group.params()) {
      const auto& state = states[number];
      const auto name = names.empty() ? std::to_string(number) : "'" + names[number] + "'";
      const auto fits = [&](const char* key, const at::Tensor& value, at::IntArrayRef shape) {
        TORCH_CHECK_VALUE(!value.defined() || value.sizes() == shape, what, ": ", key, " of parameter ", name,
                          " in the state must have shape ", shape, ", got ", value.sizes(),
                          ": another model's?");
      };
      std::vector<int64_t> channels;
      if (options.quant_bits()) {
        for (const auto& [key, value] :
             {std::pair("latent", state.latent()), std::pair("scale", state.scale())})
          TORCH_CHECK_VALUE(value.defined(), what, ": the state has no ", key, " for parameter ", name,
                            ", which is quantized");
        TORCH_CHECK_VALUE(state.momentum_buffer().defined() == state.step().defined(), what,
                          ": the state has only one of momentum_buffer and step for parameter ", name);
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
  struct Restored {
    at::Tensor param, projection;  // no projection where the parameter holds it
    const BCGDOptions* options;
    BCGDParamState state;
  };
  std::vector<Restored> fresh;  // all of it before any change
  for (const auto& group : param_groups_) {
    const auto& options = options_of(group);
    for (const auto& p : group.params()) {
      Restored one{p, {}, &options, restored(p, states[fresh.size()], options)};
      if (options.quant_bits() && !holds_projection(p, one.state, options))
        one.projection = projection(one.state, options);
      fresh.push_back(std::move(one));
    }
  }
  starts_quantized_.clear();
  for (auto& [p, w, options, state] : fresh) {
    if (!options->quant_bits() && !state.momentum_buffer().defined()) {
      state_.erase(p.unsafeGetTensorImpl());  // as before a first step
      continue;
    }
    state_of(p) = std::move(state);
    if (!options->quant_bits()) continue;
    if (w.defined()) p.copy_(w);
    leave(p);
  }
}

}  // namespace torchqat::optim
