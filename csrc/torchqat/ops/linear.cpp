#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "torchqat/ops/layer_node.h"
#include "torchqat/ops/layers.h"

namespace torchqat {
namespace {

at::Tensor plain(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  return at::linear(input, weight, bias);
}

auto dispatched() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("qat::_linear", "").typed<decltype(plain)>();
  return op;
}

struct Linear {
  static constexpr std::string_view op = "linear";

  // The products that torch takes, in its order.
  torch::autograd::variable_list derivatives(const at::Tensor& grad, const IsNeeded& is_needed) const {
    const auto x = is_needed(1) ? input->make(grad) : at::Tensor();
    const auto w = weight.get();
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto rows = grad.flatten(0, -2);
    torch::autograd::variable_list result(3);
    if (is_needed(0)) result[0] = rows.mm(w).view_symint(size);
    if (is_needed(1)) result[1] = rows.t().mm(x.flatten(0, -2));
    if (has_bias && is_needed(2)) result[2] = rows.sum(0);
    return result;
  }
  void each_field(auto&& f) { each(f, input, size, weight, has_bias); }

  std::shared_ptr<Recipe> input;
  std::vector<c10::SymInt> size;  // of the input
  Ingredient weight;
  bool has_bias = false;
};

// Whether torch computes it by products of matrices of rows, whose derivatives are those above.
bool is_by_rows(const at::Tensor& input, const at::Tensor& weight) {
  return weight.dim() == 2 && input.dim() >= 2 && input.is_contiguous() && weight.is_contiguous();
}

at::Tensor autograd(const at::Tensor& input, const at::Tensor& weight,
                    const std::optional<at::Tensor>& bias) {
  const auto b = bias.value_or(at::Tensor());
  const bool differentiate = is_differentiated({input, weight, b}) && is_by_rows(input, weight);
  Linear linear;
  if (differentiate) linear.input = recipe_of(input);
  if (!linear.input) return plain(input, weight, bias);
  linear.size = input.sym_sizes().vec();
  linear.weight = weight.detach();  // as torch, which keeps a view: weight.data may be given another memory
  linear.has_bias = b.defined();
  at::Tensor y;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    y = plain(input, weight, bias);
  }
  set_layer_history(y, std::move(linear), torch::autograd::collect_next_edges(input, weight, b));
  return y;
}

template <c10::DeviceType device, c10::DispatchKey key>
at::Tensor autocast(const at::Tensor& input, const at::Tensor& weight,
                    const std::optional<at::Tensor>& bias) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  return dispatched().call(autocast_with_recipe(input, dtype, device),
                           at::autocast::cached_cast(dtype, weight, device),
                           at::autocast::cached_cast(dtype, bias, device));
}

}  // namespace

at::Tensor layer_linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) {
  return dispatched().call(input, weight, bias);
}

TORCH_LIBRARY_IMPL(qat, CompositeExplicitAutograd, m) { m.impl("_linear", plain); }

TORCH_LIBRARY_IMPL(qat, Autograd, m) { m.impl("_linear", autograd); }

// torch.vmap batches what it calls.
TORCH_LIBRARY_IMPL(qat, FuncTorchBatched, m) { m.impl("_linear", plain); }

TORCH_LIBRARY_IMPL(qat, AutocastCPU, m) {
  m.impl("_linear", autocast<c10::kCPU, c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(qat, AutocastCUDA, m) {
  m.impl("_linear", autocast<c10::kCUDA, c10::DispatchKey::AutocastCUDA>);
}

}  // namespace torchqat
