#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "torchqat/ops/layer_node.h"
#include "torchqat/ops/layers.h"

namespace torchqat {
namespace {

// As torch.nn.functional calls it, for the dimensions of the weight.
at::Tensor plain(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                 c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                 c10::SymInt groups, bool) {
  if (weight.dim() == 3)
    return at::conv1d_symint(input, weight, bias, stride, padding, dilation, std::move(groups));
  return at::conv2d_symint(input, weight, bias, stride, padding, dilation, std::move(groups));
}

auto dispatched() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("qat::_convolution", "").typed<decltype(plain)>();
  return op;
}

struct Convolution : RecipeOf<Convolution> {
  static constexpr std::string_view op = "convolution";

  at::Tensor make(const at::Tensor& grad) const override {
    const auto x = input->make(grad);
    auto w = weight.get();
    const auto b = bias.get();
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    // What backward is called in is not what forward was.
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    if (at::isTensorSubclassLike(grad))
      w = in_backward(w, grad);  // a compiler's: the input may be kept as it is
    return at::convolution_symint(x, w, b, stride, padding, dilation, /*transposed=*/false, zeros(), groups);
  }
  torch::autograd::variable_list derivatives(const at::Tensor& grad, const IsNeeded& is_needed) const {
    const auto w = weight.get();
    // Its values matter to the gradient of the weight alone.
    const auto x =
        is_needed(1) ? input->make(grad) : at::empty_strided_symint(size, x_stride, grad.options());
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const std::vector<c10::SymInt> bias_sizes{w.sym_size(0)};
    auto [grad_x, grad_w, grad_b] = at::convolution_backward_symint(
        grad, x, w, has_bias ? at::OptionalSymIntArrayRef(bias_sizes) : std::nullopt, stride, padding,
        dilation, /*transposed=*/false, zeros(), groups,
        {is_needed(0), is_needed(1), has_bias && is_needed(2)});
    return {grad_x, grad_w, grad_b};
  }
  void each_field(auto&& f) {
    each(f, input, size, x_stride, weight, bias, has_bias, stride, padding, dilation, groups);
  }

  std::shared_ptr<Recipe> input;
  std::vector<c10::SymInt> size, x_stride;  // of the input
  Ingredient weight, bias;
  bool has_bias = false;
  std::vector<c10::SymInt> stride, padding, dilation;
  c10::SymInt groups;

 private:
  std::vector<c10::SymInt> zeros() const { return std::vector<c10::SymInt>(stride.size(), 0); }
};

at::Tensor autograd(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                    c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                    c10::SymInt groups, bool recompute) {
  const auto b = bias.value_or(at::Tensor());
  Convolution convolution;
  const bool differentiate = is_differentiated({input, weight, b});
  // A result that has no gradient may be recomputed all the same, for the normalization that reads it.
  const bool may_recompute = recompute && at::GradMode::is_enabled() && !any_tangent({input, weight, b});
  if ((differentiate || may_recompute) && input.dim() == weight.dim()) {
    convolution.input = recipe_of(input);
    if (!convolution.input && recompute) {
      auto whole = std::make_shared<Whole>();
      whole->tensor = input;
      convolution.input = std::move(whole);
    }
  }
  if (!convolution.input)
    return plain(input, weight, bias, stride, padding, dilation, std::move(groups), recompute);
  convolution.size = input.sym_sizes().vec();
  convolution.x_stride = input.sym_strides().vec();
  convolution.weight = weight;
  convolution.has_bias = b.defined();
  convolution.stride = stride.vec();
  convolution.padding = padding.vec();
  convolution.dilation = dilation.vec();
  convolution.groups = groups;
  at::Tensor y;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    y = plain(input, weight, bias, stride, padding, dilation, std::move(groups), recompute);
  }
  if (differentiate) set_layer_history(y, convolution, torch::autograd::collect_next_edges(input, weight, b));
  if (recompute) {
    convolution.bias = b;
    attach_recipe(y, std::make_shared<Convolution>(std::move(convolution)));
  }
  return y;
}

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor autocast(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                    c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                    c10::SymInt groups, bool recompute) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  return dispatched().call(autocast_with_recipe(input, dtype, device),
                           at::autocast::cached_cast(dtype, weight, device),
                           at::autocast::cached_cast(dtype, bias, device), stride, padding, dilation,
                           std::move(groups), recompute);
}

}  // namespace

at::Tensor layer_convolution(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                             at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                             int64_t groups, bool recompute) {
  return dispatched().call(input, weight, bias, c10::fromIntArrayRefSlow(stride),
                           c10::fromIntArrayRefSlow(padding), c10::fromIntArrayRefSlow(dilation), groups,
                           recompute);
}

TORCH_LIBRARY_IMPL(qat, CompositeExplicitAutograd, m) { m.impl("_convolution", plain); }

TORCH_LIBRARY_IMPL(qat, Autograd, m) { m.impl("_convolution", autograd); }

// torch.vmap batches what it calls.
TORCH_LIBRARY_IMPL(qat, FuncTorchBatched, m) { m.impl("_convolution", plain); }

TORCH_LIBRARY_IMPL(qat, AutocastCPU, m) {
  m.impl("_convolution", autocast<c10::kCPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(qat, AutocastCUDA, m) {
  m.impl("_convolution", autocast<c10::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace torchqat
