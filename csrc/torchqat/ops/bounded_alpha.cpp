#include <ATen/ATen.h>
#include <torch/library.h>

#include "torchqat/ops/autograd_node.h"
#include "torchqat/ops/layers.h"

namespace torchqat {
namespace {

// The training habits of BCGD's authors for a learnable step size, kept out of the operators that state the
// mathematics. The gradient passes also where the bound acts.
at::Tensor plain(const at::Tensor& alpha, double minimum, double, double) { return alpha.clamp_min(minimum); }

auto dispatched() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("qat::_bounded_alpha", "").typed<decltype(plain)>();
  return op;
}

struct BoundedAlphaBackward : torch::autograd::Node {
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    if (!grads[0].defined()) return {at::Tensor()};
    return {(grads[0] * grad_scale).clamp(-grad_clip, grad_clip)};
  }
  std::string name() const override { return "BoundedAlphaBackward"; }
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(grad_scale);
    args.collect(grad_clip);
  }
  torch::autograd::variable_list apply_with_saved(const torch::autograd::variable_list& grads,
                                                  torch::dynamo::autograd::SwapSavedVariables&) override {
    return apply(torch::autograd::variable_list(grads));
  }

  double grad_scale = 1;
  double grad_clip = 0;
};

at::Tensor bounded_alpha_autograd(const at::Tensor& alpha, double minimum, double grad_scale,
                                  double grad_clip) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !has_tangent(alpha),
      "StaircaseReLU: forward-mode derivatives (jvp) are not implemented; use reverse mode");
  at::Tensor result;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    result = dispatched().call(alpha, minimum, grad_scale, grad_clip);
  }
  if (at::GradMode::is_enabled() && alpha.requires_grad()) {
    auto node = make_node<BoundedAlphaBackward>();
    node->set_next_edges(torch::autograd::collect_next_edges(alpha));
    node->grad_scale = grad_scale;
    node->grad_clip = grad_clip;
    torch::autograd::set_history(result, node);
  }
  return result;
}

}  // namespace

at::Tensor bounded_alpha(const at::Tensor& alpha, double minimum, double grad_scale, double grad_clip) {
  return dispatched().call(alpha, minimum, grad_scale, grad_clip);
}

TORCH_LIBRARY_IMPL(qat, CompositeExplicitAutograd, m) { m.impl("_bounded_alpha", plain); }

TORCH_LIBRARY_IMPL(qat, Autograd, m) { m.impl("_bounded_alpha", bounded_alpha_autograd); }

}  // namespace torchqat
