#include "torchqat/optim/param_groups.h"

#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>

#include <algorithm>
#include <array>
#include <set>
#include <utility>

#include "torchqat/nn/quant_layers.h"
#include "torchqat/nn/staircase_relu.h"

namespace torchqat::optim {
namespace {

using torch::nn::Module;

// What a module wants for a parameter: the group it belongs to and what sets that group apart.
struct Role {
  enum Name { quantized, alphas, floating } name = floating;
  std::optional<int64_t> channel_dim;
  std::optional<double> min_value;
  bool operator==(const Role&) const = default;
};
constexpr std::array<const char*, 3> kNames{"quantized", "alphas", "float"};

template <typename... Layers>
bool is_one_of(const Module& module) {
  return (dynamic_cast<const Layers*>(&module) || ...);
}

bool is_transposed(const Module& module) {
  using namespace torch::nn;
  return is_one_of<ConvTranspose1dImpl, ConvTranspose2dImpl, ConvTranspose3dImpl>(module);
}

bool has_weight(const Module& module) {
  using namespace torch::nn;
  return is_one_of<LinearImpl, Conv1dImpl, Conv2dImpl, Conv3dImpl, torchqat::nn::QuantConv1dImpl,
                   torchqat::nn::QuantConv2dImpl>(module) ||
         is_transposed(module);
}

using Modules = std::vector<std::pair<std::string, const Module*>>;

Modules named_modules(const Module& model) {
  Modules modules;
  model.apply([&](const std::string& name, const Module& module) { modules.emplace_back(name, &module); });
  return modules;
}

bool is_inside(const std::string& name, const std::string& excluded) {
  return excluded.empty() || name == excluded || name.rfind(excluded + ".", 0) == 0;
}

Role role_of(const Module& module, const std::string& key, bool quantized,
             std::optional<int64_t> channel_dim) {
  const auto* staircase = dynamic_cast<const torchqat::nn::StaircaseReLUImpl*>(&module);
  if (staircase && key == "alpha") return {Role::alphas, std::nullopt, staircase->options.alpha_min()};
  if (!quantized || key != "weight") return {};
  // Transposed convolutions have the output channel in dimension 1.
  if (is_transposed(module) && (channel_dim == 0 || channel_dim == 1)) channel_dim = 1 - *channel_dim;
  return {Role::quantized, channel_dim, std::nullopt};
}

void check(const Modules& modules, std::optional<int64_t> weight_bits, const ParamGroupsOptions& options) {
  TORCH_CHECK_VALUE(weight_bits.value_or(1) >= 1 && weight_bits.value_or(1) <= 8,
                    "param_groups: weight_bits must be in 1..8, got ", *weight_bits);
  for (const auto& name : options.exclude()) {
    const bool known =
        std::any_of(modules.begin(), modules.end(), [&](const auto& module) { return module.first == name; });
    TORCH_CHECK_VALUE(known, "param_groups: exclude names no module of the model: ", name);
  }
}

// The modules with weights that the options leave float.
std::set<const Module*> ends(const Modules& modules, const ParamGroupsOptions& options) {
  std::vector<const Module*> layers;  // each once
  for (const auto& [name, module] : modules) {
    if (has_weight(*module) && std::find(layers.begin(), layers.end(), module) == layers.end())
      layers.push_back(module);
  }
  std::set<const Module*> left_float;
  if (!layers.empty() && !options.quantize_first()) left_float.insert(layers.front());
  if (!layers.empty() && !options.quantize_last()) left_float.insert(layers.back());
  return left_float;
}

// Every parameter that is trained, in the model's order; one that modules want different roles for stays
// float.
std::vector<std::pair<at::Tensor, Role>> roles_of(const Modules& modules, const ParamGroupsOptions& options) {
  const auto left_float = ends(modules, options);
  std::vector<std::pair<at::Tensor, Role>> roles;
  for (const auto& [name, module] : modules) {
    const bool excluded =
        std::any_of(options.exclude().begin(), options.exclude().end(),
                    [&, &name = name](const auto& other) { return is_inside(name, other); });
    const bool quantized = has_weight(*module) && !left_float.count(module) && !excluded;
    for (const auto& parameter : module->named_parameters(/*recurse=*/false)) {
      if (!parameter.value().requires_grad()) continue;
      const auto role = role_of(*module, parameter.key(), quantized, options.channel_dim());
      const auto known = std::find_if(roles.begin(), roles.end(),
                                      [&](const auto& r) { return r.first.is_same(parameter.value()); });
      if (known == roles.end())
        roles.emplace_back(parameter.value(), role);
      else if (!(known->second == role))
        known->second = {};
    }
  }
  return roles;
}

using Members = std::vector<std::pair<Role, std::vector<at::Tensor>>>;

// The parameters of each role, in the order of the names.
Members by_role(const std::vector<std::pair<at::Tensor, Role>>& roles) {
  Members members;
  for (const auto& [param, role] : roles) {
    auto found = std::find_if(members.begin(), members.end(),
                              [&, &role = role](const auto& m) { return m.first == role; });
    if (found == members.end()) found = members.insert(members.end(), {role, {}});
    found->second.push_back(param);
  }
  std::stable_sort(members.begin(), members.end(),
                   [](const auto& a, const auto& b) { return a.first.name < b.first.name; });
  return members;
}

ParamGroup group_of(const Role& role, std::vector<at::Tensor> params, std::optional<int64_t> weight_bits,
                    const ParamGroupsOptions& options) {
  ParamGroup group{.name = kNames[role.name], .params = std::move(params), .min_value = role.min_value};
  if (role.name == Role::quantized && weight_bits) {
    group.quant_bits = weight_bits;
    group.channel_dim = role.channel_dim;
    group.method = options.method();
  } else if (role.name == Role::alphas) {
    group.lr = options.alpha_lr();
    group.weight_decay = options.alpha_weight_decay();
  }
  return group;
}

}  // namespace

std::vector<ParamGroup> param_groups(const Module& model, std::optional<int64_t> weight_bits,
                                     const ParamGroupsOptions& options) {
  const auto modules = named_modules(model);
  check(modules, weight_bits, options);
  auto members = by_role(roles_of(modules, options));
  TORCH_CHECK_VALUE(!weight_bits || (!members.empty() && members.front().first.name == Role::quantized),
                    "param_groups: the model has no weight to quantize");
  std::vector<ParamGroup> groups;
  for (auto& [role, params] : members)
    groups.push_back(group_of(role, std::move(params), weight_bits, options));
  return groups;
}

}  // namespace torchqat::optim
