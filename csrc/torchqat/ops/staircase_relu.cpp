#include "torchqat/ops/staircase_relu.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "torchqat/math/step_codes.h"
#include "torchqat/ops/dtypes.h"
#include "torchqat/ops/layer_node.h"
#include "torchqat/ops/not_differentiable.h"
#include "torchqat/ops/staircase_relu_device.h"
#include "torchqat/ops/ste.h"

namespace torchqat {
namespace {

void check_alpha(std::string_view op, const at::Tensor& x, const at::Tensor& alpha, int64_t channel_dim) {
  TORCH_CHECK_TYPE(alpha.layout() == at::kStrided, op, ": alpha must be a dense tensor, got layout ",
                   alpha.layout());
  TORCH_CHECK_TYPE(is_supported(alpha.scalar_type()), op, ": alpha must be ", kSupportedDtypes, ", got ",
                   alpha.scalar_type());
  TORCH_CHECK_VALUE(alpha.device() == x.device(), op, ": alpha must be on the device of x, ", x.device(),
                    ", got ", alpha.device());
  TORCH_CHECK_VALUE(alpha.dim() <= 1, op, ": alpha must have shape [], [1] or [channels], got ",
                    alpha.sym_sizes());
  if (alpha.dim() == 0 || alpha.sym_size(0) == 1) return;
  TORCH_CHECK_VALUE(-x.dim() <= channel_dim && channel_dim < x.dim(), op, ": channel_dim must be in -",
                    x.dim(), "..", x.dim() - 1, " for x of shape ", x.sym_sizes(), ", got ", channel_dim);
  TORCH_CHECK_VALUE(alpha.sym_size(0) == x.sym_size(channel_dim), op,
                    ": alpha must have one element, or one for each ", "of the ", x.sym_size(channel_dim),
                    " channels of dimension ", channel_dim, " of x, got shape ", alpha.sym_sizes());
}

void check(std::string_view op, const at::Tensor& x, const at::Tensor& alpha, int64_t bits,
           int64_t channel_dim) {
  TORCH_CHECK_TYPE(x.layout() == at::kStrided, op, ": x must be a dense tensor, got layout ", x.layout());
  TORCH_CHECK_TYPE(is_supported(x.scalar_type()), op, ": x must be ", kSupportedDtypes, ", got ",
                   x.scalar_type());
  TORCH_CHECK_VALUE(1 <= bits && bits <= 8, op, ": bits must be in 1..8, got ", bits);
  check_alpha(op, x, alpha, channel_dim);
}

void check_kept(std::string_view op, const at::Tensor& kept, c10::SymIntArrayRef size, int code_bits) {
  const auto bytes = math::code_bytes(c10::multiply_integers(size), code_bits);
  TORCH_CHECK_VALUE(kept.scalar_type() == at::kByte && kept.is_contiguous() && kept.sym_numel() == bytes, op,
                    ": what is kept must be ", bytes, " contiguous bytes for size ", size, ", got ",
                    kept.sym_numel(), " of ", kept.scalar_type());
}

at::Tensor dense_tensor(std::string_view op, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                        const at::TensorOptions& options) {
  auto tensor = at::empty_strided_symint(size, stride, options);
  TORCH_CHECK_VALUE(tensor.is_non_overlapping_and_dense(), op, ": stride ", stride,
                    " must be that of a dense tensor of size ", size);
  return tensor;
}

// Typed handles into the dispatcher.
auto forward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("qat::_staircase_relu_forward", "")
                             .typed<decltype(staircase_relu_forward_meta)>();
  return op;
}

auto rebuild_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("qat::_staircase_relu_rebuild", "")
                             .typed<decltype(staircase_relu_rebuild_meta)>();
  return op;
}

auto backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("qat::_staircase_relu_backward", "")
                             .typed<decltype(staircase_relu_backward_meta)>();
  return op;
}

auto public_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("qat::staircase_relu", "")
                             .typed<decltype(staircase_relu_meta)>();
  return op;
}

// y, from its codes.
struct Steps : RecipeOf<Steps> {
  at::Tensor make(const at::Tensor& grad) const override {
    const auto codes_now = codes.get();  // with autograd on: checkpointing computes it again here
    const auto alpha_now = alpha.get();
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    return rebuild_op().call(codes_now, alpha_now, size, stride, dtype, bits, channel_dim, grad);
  }
  void each_field(auto&& f) { each(f, codes, alpha, size, stride, dtype, bits, channel_dim); }

  Ingredient codes, alpha;
  std::vector<c10::SymInt> size, stride;
  at::ScalarType dtype = at::kFloat;
  int64_t bits = 0;
  int64_t channel_dim = 0;
};

// What the staircase itself keeps.
struct StaircaseRelu {
  static constexpr std::string_view op = "staircase_relu";

  torch::autograd::variable_list derivatives(const at::Tensor& grad, const IsNeeded& is_needed) const {
    const auto saved_now = saved.get();
    const auto alpha_now = alpha.get();
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [grad_x, grad_alpha] = backward_op().call(grad, saved_now, alpha_now, size, stride, bits, ste,
                                                   alpha_grad, channel_dim, codes);
    return {is_needed(0) ? grad_x : at::Tensor(), is_needed(1) ? grad_alpha : at::Tensor()};
  }
  void each_field(auto&& f) {
    each(f, saved, alpha, size, stride, bits, ste, alpha_grad, channel_dim, codes);
  }

  Ingredient saved;  // packed regions or codes, or x
  Ingredient alpha;
  std::vector<c10::SymInt> size, stride;  // of y: how what is packed is ordered
  int64_t bits = 0;
  std::string ste, alpha_grad;
  int64_t channel_dim = 0;
  bool codes = false;
};

at::Tensor staircase_relu_autograd(const at::Tensor& x, const at::Tensor& alpha, int64_t bits,
                                   std::string_view ste, std::string_view alpha_grad, int64_t channel_dim,
                                   bool save_codes) {
  check("staircase_relu", x, alpha, bits, channel_dim);
  const Needs needs = backward_needs(ste, alpha_grad, alpha.requires_grad() ? bits : 1);
  TORCH_CHECK_NOT_IMPLEMENTED(
      !has_tangent(x) && !has_tangent(alpha),
      "staircase_relu: forward-mode derivatives (jvp) are not implemented; use reverse mode");
  const bool differentiate = at::GradMode::is_enabled() && (x.requires_grad() || alpha.requires_grad());
  const bool codes = save_codes || needs == Needs::level || (bits == 1 && needs == Needs::region);
  const bool from_x = needs == Needs::x;
  at::Tensor y;
  at::Tensor kept;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (!differentiate || (from_x && !codes)) {
      y = public_op().call(x, alpha, bits, ste, alpha_grad, channel_dim, save_codes);
    } else {
      std::tie(y, kept) = forward_op().call(x, alpha, bits, channel_dim, codes);
    }
  }
  if (!differentiate) return y;
  StaircaseRelu backward;
  backward.saved = from_x ? x : kept;
  backward.alpha = alpha;
  backward.size = y.sym_sizes().vec();
  backward.stride = y.sym_strides().vec();
  backward.bits = bits;
  backward.ste = ste;
  backward.alpha_grad = alpha_grad;
  backward.channel_dim = channel_dim;
  backward.codes = codes;
  std::shared_ptr<Steps> steps;
  if (codes) {
    steps = std::make_shared<Steps>();
    steps->codes = kept;
    steps->alpha = alpha;
    steps->size = backward.size;
    steps->stride = backward.stride;
    steps->dtype = y.scalar_type();
    steps->bits = bits;
    steps->channel_dim = channel_dim;
  }
  set_layer_history(y, std::move(backward), torch::autograd::collect_next_edges(x, alpha));
  if (steps) attach_recipe(y, std::move(steps));
  return y;
}

at::Tensor staircase_codes_autograd(const at::Tensor& x, const at::Tensor& alpha, int64_t bits,
                                    int64_t channel_dim) {
  check("staircase_codes", x, alpha, bits, channel_dim);
  check_not_differentiated("staircase_codes", x);
  check_not_differentiated("staircase_codes", alpha);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return staircase_codes(x, alpha, bits, channel_dim);
}

}  // namespace

int kept_bits(int64_t bits, bool codes) { return codes ? math::state_bits(bits) : math::kRegionBits; }

std::optional<int64_t> alpha_channel_dim(const at::Tensor& x, const at::Tensor& alpha, int64_t channel_dim) {
  if (alpha.numel() == 1 || alpha.dim() == 0) return std::nullopt;
  return at::maybe_wrap_dim(channel_dim, x.dim());
}

at::Tensor staircase_relu_meta(const at::Tensor& x, const at::Tensor& alpha, int64_t bits,
                               std::string_view ste, std::string_view alpha_grad, int64_t channel_dim, bool) {
  check("staircase_relu", x, alpha, bits, channel_dim);
  backward_needs(ste, alpha_grad, bits);  // raises for unknown names
  return at::empty_like(x);
}

at::Tensor staircase_codes_meta(const at::Tensor& x, const at::Tensor& alpha, int64_t bits,
                                int64_t channel_dim) {
  check("staircase_codes", x, alpha, bits, channel_dim);
  return at::empty_like(x, x.options().dtype(at::kByte));
}

std::tuple<at::Tensor, at::Tensor> staircase_relu_forward_meta(const at::Tensor& x, const at::Tensor& alpha,
                                                               int64_t bits, int64_t channel_dim,
                                                               bool codes) {
  check("staircase_relu", x, alpha, bits, channel_dim);
  const auto bytes = math::code_bytes(x.sym_numel(), kept_bits(bits, codes));
  return {at::empty_like(x), at::empty_symint({bytes}, x.options().dtype(at::kByte))};
}

at::Tensor staircase_relu_rebuild_meta(const at::Tensor& codes, const at::Tensor& alpha,
                                       c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                                       at::ScalarType dtype, int64_t bits, int64_t channel_dim,
                                       const at::Tensor& /*grad*/) {
  check_kept("_staircase_relu_rebuild", codes, size, kept_bits(bits, /*codes=*/true));
  auto y = dense_tensor("_staircase_relu_rebuild", size, stride, codes.options().dtype(dtype));
  check("_staircase_relu_rebuild", y, alpha, bits, channel_dim);
  return y;
}

// The result's shape is stated rather than read off grad, whose shape compiled autograd does not know while
// it traces.
std::tuple<at::Tensor, at::Tensor> staircase_relu_backward_meta(
    const at::Tensor& grad, const at::Tensor& saved, const at::Tensor& alpha, c10::SymIntArrayRef size,
    c10::SymIntArrayRef stride, int64_t bits, std::string_view, std::string_view, int64_t channel_dim,
    bool codes) {
  TORCH_CHECK_VALUE(saved.device() == grad.device() && alpha.device() == grad.device(),
                    "_staircase_relu_backward: grad, saved and alpha must be on one device, got ",
                    grad.device(), ", ", saved.device(), " and ", alpha.device());
  if (!saved.is_floating_point()) check_kept("_staircase_relu_backward", saved, size, kept_bits(bits, codes));
  auto grad_x = dense_tensor("_staircase_relu_backward", size, stride, grad.options());
  check("_staircase_relu_backward", grad_x, alpha, bits, channel_dim);
  return {std::move(grad_x), at::empty_like(alpha)};
}

at::Tensor staircase_relu(const at::Tensor& x, const at::Tensor& alpha, int64_t bits, std::string_view ste,
                          std::string_view alpha_grad, int64_t channel_dim, bool save_codes) {
  return public_op().call(x, alpha, bits, ste, alpha_grad, channel_dim, save_codes);
}

at::Tensor staircase_codes(const at::Tensor& x, const at::Tensor& alpha, int64_t bits, int64_t channel_dim) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("qat::staircase_codes", "")
                             .typed<decltype(staircase_codes_meta)>();
  return op.call(x, alpha, bits, channel_dim);
}

std::vector<std::string> ste_names() {
  return std::apply([](auto... ste) { return std::vector<std::string>{std::string(ste.name)...}; },
                    math::SteCatalogue{});
}

TORCH_LIBRARY_IMPL(qat, Autograd, m) {
  m.impl("staircase_relu", staircase_relu_autograd);
  m.impl("staircase_codes", staircase_codes_autograd);
  m.impl("_staircase_relu_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("_staircase_relu_rebuild", torch::autograd::autogradNotImplementedFallback());
  m.impl("_staircase_relu_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(qat, Meta, m) {
  m.impl("staircase_relu", staircase_relu_meta);
  m.impl("staircase_codes", staircase_codes_meta);
  m.impl("_staircase_relu_forward", staircase_relu_forward_meta);
  m.impl("_staircase_relu_rebuild", staircase_relu_rebuild_meta);
  m.impl("_staircase_relu_backward", staircase_relu_backward_meta);
}

}  // namespace torchqat
