#pragma once

#include <ATen/ATen.h>

#include <string>

#include "torchqat/optim/bcgd.h"

// A parameter and its float latent: making them, comparing them.
namespace torchqat::optim {

// The dtype of latent, scale and momentum.
at::ScalarType compute_dtype(const at::Tensor& param);

struct NewLatent {
  at::Tensor latent, projection, scale;
};
// The latent that the values of `param` make.
NewLatent new_latent(const at::Tensor& param, const BCGDOptions& options);

// A momentum buffer that the first step overwrites; one left by plain steps goes on instead.
void add_momentum(const at::Tensor& param, BCGDParamState& state);

// w as a step leaves it: scale * level, from the latent and the stored scale.
at::Tensor projection(const BCGDParamState& state, const BCGDOptions& options);

// Whether the parameter's values are the projection of its latent; NaN equals NaN.
bool holds_projection(const at::Tensor& param, const BCGDParamState& state, const BCGDOptions& options);

// Whether the values that became the latent were a projection already, but for rounding. Nothing can be told
// where the values are not more than their levels, or are all the same.
bool was_quantized(const at::Tensor& param, const BCGDParamState& state, const BCGDOptions& options);

// Moves the state to the parameter's device and dtype, where the model was moved or cast meanwhile.
void fit_to(const at::Tensor& param, BCGDParamState& state);

// A copy of a saved state with the parameter's strides: of a quantized one in the dtype of computation, of a
// plain one in the parameter's.
BCGDParamState restored(const at::Tensor& param, const BCGDParamState& saved, const BCGDOptions& options);

// What a saved state must have been quantized as to fit, as text.
std::string quantization(const BCGDOptions& options);

// Calls f(its name, the tensor) for each tensor of a state, defined or not.
template <typename State, typename F>
void for_each_tensor(State& state, F&& f) {
  f("latent", state.latent());
  f("scale", state.scale());
  f("momentum_buffer", state.momentum_buffer());
  f("step", state.step());
}

}  // namespace torchqat::optim
