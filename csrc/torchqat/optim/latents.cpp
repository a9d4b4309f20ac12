#include "torchqat/optim/latents.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "torchqat/ops/quantize_weight.h"

namespace torchqat::optim {
namespace {

// The relative spacing of a dtype's numbers.
double spacing(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return std::ldexp(1.0, -10);
    case at::kBFloat16:
      return std::ldexp(1.0, -7);
    case at::kDouble:
      return std::numeric_limits<double>::epsilon();
    default:
      return std::numeric_limits<float>::epsilon();
  }
}

}  // namespace

at::ScalarType compute_dtype(const at::Tensor& param) {
  const auto dtype = param.scalar_type();
  return dtype == at::kHalf || dtype == at::kBFloat16 ? at::kFloat : dtype;
}

NewLatent new_latent(const at::Tensor& param, const BCGDOptions& options) {
  const auto latent = param.detach().to(compute_dtype(param), /*non_blocking=*/false, /*copy=*/true);
  auto [quantized, scale] =
      quantize_weight(latent, *options.quant_bits(), options.method(), options.channel_dim());
  return {latent, quantized, scale};
}

void add_momentum(const at::Tensor& param, BCGDParamState& state) {
  const bool taken = state.momentum_buffer().defined();
  state.momentum_buffer(taken ? state.momentum_buffer().to(state.latent().scalar_type())
                              : at::zeros_like(state.latent()));
  state.step(at::full({}, taken ? 1.0 : 0.0, at::TensorOptions(at::kFloat).device(param.device())));
}

at::Tensor projection(const BCGDParamState& state, const BCGDOptions& options) {
  const auto& latent = state.latent();
  const int64_t bits = *options.quant_bits();
  auto nearest = latent;
  if (options.method() != "exact") {
    // The levels of these methods are not those nearest to the latent at the final scale.
    nearest = std::get<0>(quantize_weight(latent, bits, options.method(), options.channel_dim()));
  }
  auto scale = state.scale();
  const auto codes = weight_codes(nearest, scale, bits, options.channel_dim());
  if (scale.dim() == 1) {
    std::vector<int64_t> shape(latent.dim(), 1);
    shape[at::maybe_wrap_dim(*options.channel_dim(), latent.dim())] = -1;
    scale = scale.reshape(shape);
  }
  return codes.to(latent.scalar_type()).mul(scale);
}

bool holds_projection(const at::Tensor& param, const BCGDParamState& state, const BCGDOptions& options) {
  if (state.latent().sizes() != param.sizes()) return false;
  const auto w = projection(state, options).to(param.scalar_type());
  const auto p = param.detach();
  return at::equal(p, w) || p.eq(w).logical_or_(p.isnan().logical_and_(w.isnan())).all().item<bool>();
}

bool was_quantized(const at::Tensor& param, const BCGDParamState& state, const BCGDOptions& options) {
  const auto& latent = state.latent();
  const int64_t levels = (int64_t{1} << *options.quant_bits()) * state.scale().numel();
  if (latent.is_meta() || latent.numel() <= levels || latent.min().equal(latent.max())) return false;
  const double rounding = std::max(spacing(param.scalar_type()), std::ldexp(1.0, -20));
  return at::allclose(param.detach().to(latent.scalar_type()), latent, rounding, /*atol=*/0.0);
}

void fit_to(const at::Tensor& param, BCGDParamState& state) {
  for (auto* tensor : {&state.latent(), &state.momentum_buffer(), &state.scale()}) {
    if (tensor->defined()) *tensor = tensor->to(param.device(), compute_dtype(param));
  }
  if (state.step().defined()) state.step(state.step().to(param.device()));
}

BCGDParamState restored(const at::Tensor& param, const BCGDParamState& saved, const BCGDOptions& options) {
  const auto dtype = options.quant_bits() ? compute_dtype(param) : param.scalar_type();
  const auto like_param = [&](const at::Tensor& t) {
    return t.defined() ? at::empty_like(param.detach(), dtype).copy_(t) : at::Tensor();
  };
  const auto moved = [&](const at::Tensor& t, at::ScalarType to) {
    return t.defined() ? t.to(param.device(), to, /*non_blocking=*/false, /*copy=*/true) : at::Tensor();
  };
  return BCGDParamState()
      .latent(like_param(saved.latent()))
      .momentum_buffer(like_param(saved.momentum_buffer()))
      .scale(moved(saved.scale(), dtype))
      .step(moved(saved.step(), at::kFloat));
}

std::string quantization(const BCGDOptions& options) {
  const auto or_none = [](const auto& value) { return value ? c10::str(*value) : "None"; };
  return c10::str("quant_bits=", or_none(options.quant_bits()),
                  ", channel_dim=", or_none(options.channel_dim()), ", method=", options.method());
}

}  // namespace torchqat::optim
