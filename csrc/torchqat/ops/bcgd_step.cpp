#include "torchqat/ops/bcgd_step.h"

#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <algorithm>

#include "torchqat/ops/bcgd_step_device.h"
#include "torchqat/ops/layout.h"
#include "torchqat/ops/quantize_weight_device.h"

namespace torchqat {
namespace {

void call(const BcgdStep& s) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("qat::bcgd_step_", "").typed<decltype(bcgd_step_)>();
  op.call(s.params, s.grads, s.latents, s.scales, s.momentum_buffers, s.steps, s.lr, s.bits, s.channel_dim,
          s.method, s.momentum, s.dampening, s.weight_decay, s.nesterov, s.blend, s.maximize, s.grad_scale,
          s.found_inf);
}

// A step has no derivative: what requires grad may be changed under no_grad only.
void autograd(const BcgdStep& s) {
  if (at::GradMode::is_enabled()) {
    for_each_list(s, [](at::TensorList list, const char* name, bool written) {
      for (size_t i = 0; written && i < list.size(); ++i) {
        TORCH_CHECK_VALUE(!list[i].requires_grad(), "bcgd_step_: changes ", name, "[", i,
                          "], which requires grad; call it under torch.no_grad()");
      }
    });
  }
  at::AutoDispatchBelowAutograd below;
  call(s);
}

void refuse_vmap(const BcgdStep&) {
  TORCH_CHECK_VALUE(false, "bcgd_step_: works in place on lists of tensors and cannot be batched; ",
                    "call it outside torch.vmap");
}

void bump_versions(const BcgdStep& s) {
  {
    at::AutoDispatchBelowADInplaceOrView below;
    call(s);
  }
  for_each_list(s, [](at::TensorList list, const char*, bool written) {
    for (size_t i = 0; written && i < list.size(); ++i) torch::autograd::impl::bump_version(list[i]);
  });
}

}  // namespace

math::Projection projection_of(std::string_view method, int64_t bits) {
  using math::Projection;
  if (bits == 1) return Projection::mean;
  switch (weight_method("bcgd_step_", method, bits)) {
    case math::WeightMethod::lloyd:
      return Projection::lloyd;
    case math::WeightMethod::twn:
      return Projection::twn;
    case math::WeightMethod::exact:
      break;
  }
  return bits == 2 ? Projection::ternary : Projection::warm;
}

BcgdItems::BcgdItems(const BcgdStep& s, at::ScalarType dtype) {
  for (size_t i = 0; i < s.params.size(); ++i) {
    const auto& param = s.params[i];
    if (param.scalar_type() != dtype) continue;
    BcgdItem item;
    item.param = param.is_non_overlapping_and_dense() ? param : in_place(param, at::empty_like(param));
    item.grad = laid_out_as(s.grads[i], item.param);
    item.latent = in_place(s.latents[i], item.param);
    item.scale = in_place(s.scales[i], at::empty_like(s.scales[i], at::MemoryFormat::Contiguous));
    if (!s.steps.empty()) {
      item.buffer = in_place(s.momentum_buffers[i], item.param);
      item.steps = s.steps[i];
    }
    // One channel at least: the step is counted for tensors without elements too.
    item.view = {std::max<int64_t>(item.scale.numel(), 1), 1};
    if (s.channel_dim && param.numel() > 0) item.view.inner = item.param.stride(*s.channel_dim);
    items.push_back(std::move(item));
  }
}

at::Tensor BcgdItems::in_place(const at::Tensor& t, const at::Tensor& like) {
  const auto dense = laid_out_as(t, like);
  if (!dense.is_same(t)) copies_.emplace_back(t, dense);
  return dense;
}

void BcgdItems::write_back() const {
  for (const auto& [where, copy] : copies_) where.copy_(copy);
}

void bcgd_step_(at::TensorList params, at::TensorList grads, at::TensorList latents, at::TensorList scales,
                at::TensorList momentum_buffers, at::TensorList steps, const at::Tensor& lr, int64_t bits,
                std::optional<int64_t> channel_dim, std::string_view method, double momentum,
                double dampening, double weight_decay, bool nesterov, double blend, bool maximize,
                const std::optional<at::Tensor>& grad_scale, const std::optional<at::Tensor>& found_inf) {
  bcgd_step_kernel<call>(params, grads, latents, scales, momentum_buffers, steps, lr, bits, channel_dim,
                         method, momentum, dampening, weight_decay, nesterov, blend, maximize, grad_scale,
                         found_inf);
}

TORCH_LIBRARY_IMPL(qat, Autograd, m) { m.impl("bcgd_step_", bcgd_step_kernel<autograd>); }
TORCH_LIBRARY_IMPL(qat, ADInplaceOrView, m) { m.impl("bcgd_step_", bcgd_step_kernel<bump_versions>); }
TORCH_LIBRARY_IMPL(qat, FuncTorchBatched, m) { m.impl("bcgd_step_", bcgd_step_kernel<refuse_vmap>); }
// The check says which tensor is sparse.
TORCH_LIBRARY_IMPL(qat, SparseCPU, m) { m.impl("bcgd_step_", bcgd_step_kernel<check_bcgd_step>); }
TORCH_LIBRARY_IMPL(qat, SparseCUDA, m) { m.impl("bcgd_step_", bcgd_step_kernel<check_bcgd_step>); }
TORCH_LIBRARY_IMPL(qat, SparseCsrCPU, m) { m.impl("bcgd_step_", bcgd_step_kernel<check_bcgd_step>); }
TORCH_LIBRARY_IMPL(qat, SparseCsrCUDA, m) { m.impl("bcgd_step_", bcgd_step_kernel<check_bcgd_step>); }
TORCH_LIBRARY_IMPL(qat, Meta, m) { m.impl("bcgd_step_", bcgd_step_kernel<check_bcgd_step>); }

}  // namespace torchqat
