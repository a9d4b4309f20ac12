#include "torchqat/ops/quantize_weight.h"

#include <ATen/OpMathType.h>
#include <torch/library.h>

#include "torchqat/ops/dtypes.h"
#include "torchqat/ops/not_differentiable.h"
#include "torchqat/ops/quantize_weight_device.h"

namespace torchqat {
namespace {

constexpr std::pair<std::string_view, math::WeightMethod> kMethods[] = {
    {"exact", math::WeightMethod::exact},
    {"lloyd", math::WeightMethod::lloyd},
    {"twn", math::WeightMethod::twn},
};

void check(std::string_view op, const at::Tensor& weight, int64_t bits, std::optional<int64_t> channel_dim) {
  TORCH_CHECK_TYPE(weight.layout() == at::kStrided, op, ": weight must be a dense tensor, got layout ",
                   weight.layout());
  TORCH_CHECK_TYPE(is_supported(weight.scalar_type()), op, ": weight must be ", kSupportedDtypes, ", got ",
                   weight.scalar_type());
  TORCH_CHECK_VALUE(1 <= bits && bits <= 8, op, ": bits must be in 1..8, got ", bits);
  TORCH_CHECK_VALUE(!channel_dim || (-weight.dim() <= *channel_dim && *channel_dim < weight.dim()), op,
                    ": channel_dim must be a dimension of weight, which has shape ", weight.sym_sizes(),
                    ", got ", channel_dim.value_or(0));
}

// The shape of the scale.
c10::SymDimVector scale_sizes(const at::Tensor& weight, std::optional<int64_t> channel_dim) {
  if (!channel_dim) return {};
  return {weight.sym_size(*channel_dim)};
}

auto quantize_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("qat::quantize_weight", "")
                             .typed<decltype(quantize_weight_meta)>();
  return op;
}

auto codes_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("qat::weight_codes", "")
                             .typed<decltype(weight_codes_meta)>();
  return op;
}

std::tuple<at::Tensor, at::Tensor> quantize_weight_autograd(const at::Tensor& weight, int64_t bits,
                                                            std::string_view method,
                                                            std::optional<int64_t> channel_dim) {
  check("quantize_weight", weight, bits, channel_dim);  // layouts but strided have no backend that would
  check_not_differentiated("quantize_weight", weight);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return quantize_op().call(weight, bits, method, channel_dim);
}

at::Tensor weight_codes_autograd(const at::Tensor& weight, const at::Tensor& scale, int64_t bits,
                                 std::optional<int64_t> channel_dim) {
  check("weight_codes", weight, bits, channel_dim);
  check_not_differentiated("weight_codes", weight);
  check_not_differentiated("weight_codes", scale);
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  return codes_op().call(weight, scale, bits, channel_dim);
}

}  // namespace

math::WeightMethod weight_method(std::string_view op, std::string_view name, int64_t bits) {
  std::string names;
  for (const auto& [known, method] : kMethods) {
    TORCH_CHECK_VALUE(known != name || method != math::WeightMethod::twn || bits == 2, op,
                      ": method 'twn' is ternary, so bits must be 2, got ", bits);
    if (known == name) return method;
    names += (names.empty() ? "" : ", ") + std::string(known);
  }
  TORCH_CHECK_VALUE(false, op, ": unknown method '", name, "'; choose one of ", names);
}

std::optional<int64_t> wrapped(std::optional<int64_t> channel_dim, const at::Tensor& weight) {
  if (channel_dim && *channel_dim < 0) return *channel_dim + weight.dim();
  return channel_dim;
}

std::tuple<at::Tensor, at::Tensor> quantize_weight_meta(const at::Tensor& weight, int64_t bits,
                                                        std::string_view method,
                                                        std::optional<int64_t> channel_dim) {
  check("quantize_weight", weight, bits, channel_dim);
  weight_method("quantize_weight", method, bits);
  const auto opmath = weight.options().dtype(at::toOpMathType(weight.scalar_type()));
  return {at::empty_like(weight), at::empty_symint(scale_sizes(weight, channel_dim), opmath)};
}

at::Tensor weight_codes_meta(const at::Tensor& weight, const at::Tensor& scale, int64_t bits,
                             std::optional<int64_t> channel_dim) {
  check("weight_codes", weight, bits, channel_dim);
  const auto dtype = at::toOpMathType(weight.scalar_type());
  TORCH_CHECK_TYPE(scale.layout() == at::kStrided && scale.scalar_type() == dtype,
                   "weight_codes: scale must be a dense tensor of ", dtype, " for weight of ",
                   weight.scalar_type(), ", got ", scale.scalar_type(), " of layout ", scale.layout());
  TORCH_CHECK_VALUE(scale.device() == weight.device(),
                    "weight_codes: scale must be on the device of weight, ", weight.device(), ", got ",
                    scale.device());
  const auto sizes = scale_sizes(weight, channel_dim);
  TORCH_CHECK_VALUE(scale.sym_sizes().equals(sizes), "weight_codes: scale must have shape ",
                    c10::SymIntArrayRef(sizes), " for ", channel_dim ? "this" : "no", " channel_dim, got ",
                    scale.sym_sizes());
  return at::empty_like(weight, weight.options().dtype(at::kChar));
}

std::tuple<at::Tensor, at::Tensor> quantize_weight(const at::Tensor& weight, int64_t bits,
                                                   std::string_view method,
                                                   std::optional<int64_t> channel_dim) {
  return quantize_op().call(weight, bits, method, channel_dim);
}

at::Tensor weight_codes(const at::Tensor& weight, const at::Tensor& scale, int64_t bits,
                        std::optional<int64_t> channel_dim) {
  return codes_op().call(weight, scale, bits, channel_dim);
}

TORCH_LIBRARY_IMPL(qat, Autograd, m) {
  m.impl("quantize_weight", quantize_weight_autograd);
  m.impl("weight_codes", weight_codes_autograd);
}

TORCH_LIBRARY_IMPL(qat, Meta, m) {
  m.impl("quantize_weight", quantize_weight_meta);
  m.impl("weight_codes", weight_codes_meta);
}

}  // namespace torchqat
