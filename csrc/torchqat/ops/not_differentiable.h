#pragma once

#include <ATen/ATen.h>

#include <string_view>

#include "torchqat/ops/autograd_node.h"

namespace torchqat {

// For operators that are not differentiable: their results never require grad, as a detached tensor's do not,
// but torch.func would turn that into a gradient of zero without a word, so it is refused.
inline void check_not_differentiated(std::string_view op, const at::Tensor& input) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !has_tangent(input), op,
      ": not differentiable, so it has no forward-mode derivative (jvp); detach the input");
  const bool in_func_grad =
      input.unsafeGetTensorImpl()->key_set().has(c10::DispatchKey::FuncTorchGradWrapper);
  TORCH_CHECK_NOT_IMPLEMENTED(!(in_func_grad && at::GradMode::is_enabled() && input.requires_grad()), op,
                              ": not differentiable; under torch.func.grad or vjp, detach the input");
}

}  // namespace torchqat
