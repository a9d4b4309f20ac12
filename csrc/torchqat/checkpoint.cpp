#include "torchqat/checkpoint.h"

#include <ATen/ATen.h>
#include <torch/utils.h>

#include <map>
#include <set>
#include <utility>
#include <vector>

#include "torchqat/build_info.h"
#include "torchqat/checkpoint_checks.h"
#include "torchqat/nn/feature_affinity_loss.h"
#include "torchqat/nn/staircase_relu.h"
#include "torchqat/optim/latents.h"
#include "torchqat/safetensors_header.h"

namespace torchqat {
namespace {

using optim::BCGD;
using optim::BCGDOptions;
using optim::BCGDParamState;

// As python/torchqat/checkpoint.py has them.
const std::string kFormat = "torchqat checkpoint 1";
const std::string kOptimizer = "optimizer.";
const std::string kBCGD = "BCGD";
const std::string kStaircase = "staircase_relu.";
const std::string kQuantized = "quantized.";

std::string joined(const std::string& module, const std::string& name) {
  return module.empty() ? name : module + "." + name;
}

// Calls f(name, generator) for the random generators of the model.
template <typename F>
void for_each_generator(const torch::nn::Module& model, F&& f) {
  model.apply([&](const std::string& name, const torch::nn::Module& module) {
    if (const auto* loss = dynamic_cast<const nn::FastFeatureAffinityLossImpl*>(&module))
      f(joined(name, kExtraState), loss->generator);
  });
}

Tensors state_of(const torch::nn::Module& model) {
  Tensors tensors;
  model.apply([&](const std::string& module, const torch::nn::Module& m) {
    for (const auto& named : {m.named_parameters(/*recurse=*/false), m.named_buffers(/*recurse=*/false)}) {
      for (const auto& item : named) {
        if (item.value().defined()) tensors[joined(module, item.key())] = item.value().detach();
      }
    }
  });
  for_each_generator(model, [&](const std::string& name, const at::Generator& generator) {
    tensors[name] = generator.get_state();
  });
  return tensors;
}

Texts staircases_of(const torch::nn::Module& model) {
  Texts settings;
  std::set<const torch::nn::Module*> seen;  // one that has several names goes by the first, as in Python
  model.apply([&](const std::string& name, const torch::nn::Module& module) {
    const auto* staircase = dynamic_cast<const nn::StaircaseReLUImpl*>(&module);
    if (staircase && seen.insert(staircase).second) settings[kStaircase + name] = staircase->settings();
  });
  return settings;
}

struct NamedParam {
  std::string name;
  at::Tensor param;
  const BCGDOptions* options;
};

// Everything in the optimizer, in its order, by the names that the model has for it.
std::vector<NamedParam> named_params(const std::string& what, const torch::nn::Module& model,
                                     const BCGD& optimizer) {
  std::map<const void*, std::string> names;
  for (const auto& item : model.named_parameters())
    names.emplace(item.value().unsafeGetTensorImpl(), item.key());
  std::vector<NamedParam> result;
  for (size_t group = 0; group < optimizer.param_groups().size(); ++group) {
    const auto& params = optimizer.param_groups()[group].params();
    const auto& options = static_cast<const BCGDOptions&>(optimizer.param_groups()[group].options());
    for (size_t place = 0; place < params.size(); ++place) {
      const auto found = names.find(params[place].unsafeGetTensorImpl());
      TORCH_CHECK_VALUE(found != names.end(), what, ": parameter ", place, " of the optimizer's group ",
                        group, options.name().empty() ? "" : " (" + options.name() + ")", ", of shape ",
                        params[place].sizes(), ", is not in the model: give a module that holds both");
      result.push_back({found->second, params[place], &options});
    }
  }
  return result;
}

Texts projections_of(const std::vector<NamedParam>& params) {
  Texts settings;
  for (const auto& [name, param, options] : params) {
    if (options->quant_bits()) settings[kQuantized + name] = optim::quantization(*options);
  }
  return settings;
}

// The states in the optimizer's order.
std::vector<BCGDParamState> optimizer_states(const std::string& what, const Tensors& tensors,
                                             const Texts& metadata, const std::vector<NamedParam>& params) {
  TORCH_CHECK_VALUE(metadata.count("optimizer"), what,
                    ": must have the state of an optimizer; to load the model alone give none");
  TORCH_CHECK_VALUE(metadata.at("optimizer") == kBCGD, what, ": the optimizer must be '", kBCGD, "', got '",
                    printable(metadata.at("optimizer")), "'");
  check_settings(what, projections_of(params), metadata, kQuantized, "quantized parameter", "the optimizer");
  std::map<std::string, BCGDParamState> by_name;
  for (const auto& [name, value] : tensors) {
    const auto dot = name.rfind('.');
    at::Tensor* place = nullptr;
    if (dot != std::string::npos && dot >= kOptimizer.size()) {
      auto& state = by_name[name.substr(kOptimizer.size(), dot - kOptimizer.size())];
      optim::for_each_tensor(state, [&](const char* key, at::Tensor& tensor) {
        if (name.substr(dot + 1) == key) place = &tensor;
      });
    }
    TORCH_CHECK_VALUE(place && value.is_floating_point(), what,
                      ": the optimizer's state must be floating-point latent, scale, momentum_buffer, step, "
                      "got '",
                      printable(name), "' of ", value.scalar_type());
    *place = value;
  }
  std::vector<BCGDParamState> states;
  for (const auto& param : params) {
    states.push_back(by_name[param.name]);
    by_name.erase(param.name);
  }
  TORCH_CHECK_VALUE(by_name.empty(), what, ": has a state for '", printable(by_name.begin()->first),
                    "', which is not in the optimizer");
  return states;
}

// Gives the model, whose tensors are `own`, these values.
void set_state(const std::string& what, const torch::nn::Module& model, const Tensors& own,
               const Tensors& values) {
  for_each_generator(model, [&](const std::string& name, at::Generator generator) {
    try {
      generator.set_state(values.at(name));
    } catch (const c10::Error& error) {
      TORCH_CHECK_VALUE(false, what, ": '", name, "' must be the state of a generator on ",
                        generator.device(), ": ", error.what_without_backtrace());
    }
  });
  for (auto [name, value] : own) {
    if (!is_extra_state(name)) value.copy_(values.at(name));
  }
}

// What checkpoint_of() returns, with the tensors of model and optimizer themselves.
TensorFile live_checkpoint(const torch::nn::Module& model, const BCGD* optimizer) {
  TensorFile file{state_of(model), staircases_of(model)};
  for (const auto& [name, tensor] : file.tensors)
    TORCH_CHECK_VALUE(!begins(name, kOptimizer),
                      "save_checkpoint: no name in the model must begin with 'optimizer.', got '", name, "'");
  file.metadata["format"] = kFormat;
  file.metadata["torchqat"] = build_info().torchqat;
  if (!optimizer) return file;
  optimizer->refuse_swapped("save_checkpoint");
  const auto params = named_params("save_checkpoint", model, *optimizer);
  file.metadata["optimizer"] = kBCGD;
  file.metadata.merge(projections_of(params));
  for (const auto& [name, param, options] : params) {
    const auto found = optimizer->state().find(param.unsafeGetTensorImpl());
    if (found == optimizer->state().end()) continue;
    optim::for_each_tensor(static_cast<const BCGDParamState&>(*found->second),
                           [&, &name = name](const char* key, const at::Tensor& value) {
                             if (value.defined()) file.tensors[kOptimizer + name + "." + key] = value;
                           });
  }
  return file;
}

}  // namespace

TensorFile checkpoint_of(const torch::nn::Module& model, const BCGD* optimizer) {
  auto file = live_checkpoint(model, optimizer);
  for (auto& [name, tensor] : file.tensors) tensor = tensor.clone();
  return file;
}

void restore_checkpoint(const TensorFile& file, torch::nn::Module& model, BCGD* optimizer,
                        const std::string& what) {
  if (optimizer) optimizer->refuse_swapped(what.substr(0, what.find(':')));
  auto tensors = file.tensors;
  Tensors of_optimizer;
  const auto format = file.metadata.find("format");
  if (format != file.metadata.end() && begins(format->second, "torchqat checkpoint")) {
    TORCH_CHECK_VALUE(format->second == kFormat, what, ": the format must be '", kFormat, "', got '",
                      printable(format->second), "'");
    check_settings(what, staircases_of(model), file.metadata, kStaircase, "StaircaseReLU", "the model");
    for (auto it = tensors.begin(); it != tensors.end();) {
      auto next = std::next(it);
      if (begins(it->first, kOptimizer)) of_optimizer.insert(tensors.extract(it));
      it = next;
    }
  }
  auto own = state_of(model);
  check_model_state(what, tensors, own);
  std::vector<BCGDParamState> states;
  if (optimizer) {
    const auto params = named_params(what, model, *optimizer);
    states = optimizer_states(what, of_optimizer, file.metadata, params);
    std::vector<std::string> names;
    for (const auto& param : params) names.push_back(param.name);
    optimizer->check_states(states, what, names);
  }
  const torch::NoGradGuard no_grad;
  Tensors before;
  for (const auto& [name, value] : own) before[name] = value.clone();
  try {
    set_state(what, model, own, tensors);
    if (optimizer) optimizer->restore(states);
  } catch (...) {
    set_state(what, model, own, before);
    throw;
  }
}

void save_checkpoint(const std::string& path, const torch::nn::Module& model, const BCGD* optimizer) {
  save_safetensors(path, live_checkpoint(model, optimizer));
}

void load_checkpoint(const std::string& path, torch::nn::Module& model, BCGD* optimizer) {
  restore_checkpoint(load_safetensors(path), model, optimizer, "load_checkpoint: " + path);
}

}  // namespace torchqat
