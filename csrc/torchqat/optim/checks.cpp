#include "torchqat/optim/checks.h"

#include <ATen/ATen.h>
#include <c10/util/Type.h>
#include <torch/csrc/autograd/function.h>

#include <cmath>
#include <set>
#include <string>
#include <typeinfo>

namespace torchqat::optim {

const BCGDOptions& options_of(const torch::optim::OptimizerParamGroup& group) {
  const auto* options = dynamic_cast<const BCGDOptions*>(&group.options());
  TORCH_CHECK_TYPE(options, "BCGD: the options of a group must be BCGDOptions, got ",
                   c10::demangle(typeid(group.options()).name()));
  return *options;
}

void check_options(const BCGDOptions& o, const std::string& what) {
  const auto finite = [&](const char* name, double value) {
    TORCH_CHECK_VALUE(std::isfinite(value), what, ": ", name, " must be finite, got ", value);
  };
  const auto at_least_0 = [&](const char* name, double value) {
    TORCH_CHECK_VALUE(value >= 0, what, ": ", name, " must be at least 0, got ", value);
    finite(name, value);
  };
  at_least_0("lr", o.lr());
  at_least_0("momentum", o.momentum());
  finite("dampening", o.dampening());
  at_least_0("weight_decay", o.weight_decay());
  TORCH_CHECK_VALUE(o.blend() >= 0 && o.blend() <= 1, what, ": blend must be in 0..1, got ", o.blend());
  TORCH_CHECK_VALUE(!o.nesterov() || (o.momentum() > 0 && o.dampening() == 0), what,
                    ": Nesterov momentum requires a momentum and zero dampening");
}

void check_group(const BCGDOptions& o, const std::vector<at::Tensor>& params,
                 const std::vector<torch::optim::OptimizerParamGroup>& groups) {
  check_options(o);
  for (const auto& p : params)
    TORCH_CHECK_VALUE(p.defined() && p.is_leaf(), "BCGD: parameters must be leaf tensors, got ",
                      p.defined() ? c10::str("the result of ", p.grad_fn()->name()) : "an undefined one");
  std::set<const void*> known;
  for (const auto& other : groups) {
    for (const auto& p : other.params()) known.insert(p.unsafeGetTensorImpl());
  }
  for (const auto& p : params) {
    TORCH_CHECK_VALUE(known.insert(p.unsafeGetTensorImpl()).second,
                      "BCGD: a parameter must be in one group, once; one of shape ", p.sizes(),
                      " is there twice");
  }
  if (!o.quant_bits()) return;
  TORCH_CHECK_VALUE(*o.quant_bits() >= 1 && *o.quant_bits() <= 8, "BCGD: quant_bits must be in 1..8, got ",
                    *o.quant_bits());
  TORCH_CHECK_VALUE(!o.min_value(), "BCGD: min_value is for groups without quant_bits");
  for (const auto& p : params)
    TORCH_CHECK_TYPE(p.is_floating_point(),
                     "BCGD: parameters of a group with quant_bits must be floating point, got ",
                     p.scalar_type());
}

}  // namespace torchqat::optim
