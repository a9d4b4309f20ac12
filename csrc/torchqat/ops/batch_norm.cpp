#include <ATen/Context.h>
#include <torch/library.h>

#include "torchqat/ops/layer_node.h"
#include "torchqat/ops/layers.h"

namespace torchqat {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

at::Tensor plain(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                 const at::Tensor& running_mean, const at::Tensor& running_var, double momentum, double eps) {
  return at::batch_norm(input, weight, bias, running_mean, running_var, /*training=*/true, momentum, eps,
                        at::globalContext().userEnabledCuDNN());
}

auto dispatched() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("qat::_batch_norm", "").typed<decltype(plain)>();
  return op;
}

// What batch normalization keeps in training: the statistics of the batch, and how its input is made again.
struct BatchNorm {
  static constexpr std::string_view op = "batch_norm";

  torch::autograd::variable_list derivatives(const at::Tensor& grad, const IsNeeded& is_needed) const {
    const auto x = input->make(grad);
    const auto w = weight.get();
    const auto m = mean.get();
    const auto s = invstd.get();
    const auto r = reserve.get();
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [grad_x, grad_w, grad_b] =
        at::batch_norm_backward(grad, x, w, {}, {}, m, s, /*update=*/true, eps,
                                {is_needed(0), w.defined() && is_needed(1), is_needed(2)}, r);
    return {grad_x, grad_w, grad_b};
  }
  void each_field(auto&& f) { each(f, input, weight, mean, invstd, reserve, eps); }

  std::shared_ptr<Recipe> input;
  Ingredient weight, mean, invstd, reserve;
  double eps = 0;
};

at::Tensor autograd(const at::Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                    const at::Tensor& running_mean, const at::Tensor& running_var, double momentum,
                    double eps) {
  const auto w = weight.value_or(at::Tensor());
  const auto b = bias.value_or(at::Tensor());
  BatchNorm norm;
  // _batch_norm_with_update takes no empty batch.
  if (is_differentiated({input, w, b}) && input.sym_numel() != 0) norm.input = recipe_of(input);
  if (!norm.input) return plain(input, weight, bias, running_mean, running_var, momentum, eps);
  at::Tensor y;
  at::Tensor mean;
  at::Tensor invstd;
  at::Tensor reserve;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto running_mean_now = running_mean;
    auto running_var_now = running_var;
    std::tie(y, mean, invstd, reserve) =
        at::_batch_norm_with_update(input, weight, bias, running_mean_now, running_var_now, momentum, eps);
  }
  norm.weight = w;
  norm.mean = mean;
  norm.invstd = invstd;
  norm.reserve = reserve;
  norm.eps = eps;
  set_layer_history(y, std::move(norm), torch::autograd::collect_next_edges(input, w, b));
  return y;
}

}  // namespace

at::Tensor layer_batch_norm(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                            const at::Tensor& running_mean, const at::Tensor& running_var, double momentum,
                            double eps) {
  return dispatched().call(input, weight, bias, running_mean, running_var, momentum, eps);
}

TORCH_LIBRARY_IMPL(qat, CompositeExplicitAutograd, m) { m.impl("_batch_norm", plain); }

TORCH_LIBRARY_IMPL(qat, Autograd, m) { m.impl("_batch_norm", autograd); }

// torch.vmap batches what it calls.
TORCH_LIBRARY_IMPL(qat, FuncTorchBatched, m) { m.impl("_batch_norm", plain); }

}  // namespace torchqat
