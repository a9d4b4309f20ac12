#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string_view>
#include <tuple>

// What the devices share of the staircase.
namespace torchqat {

// Check the arguments and allocate the result; every backend calls them first, and they are the Meta kernels.
at::Tensor staircase_relu_meta(const at::Tensor& x, const at::Tensor& alpha, int64_t bits,
                               std::string_view ste, std::string_view alpha_grad, int64_t channel_dim,
                               bool save_codes);
at::Tensor staircase_codes_meta(const at::Tensor& x, const at::Tensor& alpha, int64_t bits,
                                int64_t channel_dim);

// The private halves of the differentiable operator. Forward also returns what backward keeps of y's elements
// in memory order: with `codes` their packed states, from which `rebuild` makes y again (ops/recipe.h tells
// what it gets the gradient for), else their packed regions (math/step_codes.h). Backward takes that, or x
// where the STE or the rule needs it (`saved` then has a floating dtype), and returns the gradients of x and
// alpha. `size` and `stride` are y's: they say how what is kept is ordered.
std::tuple<at::Tensor, at::Tensor> staircase_relu_forward_meta(const at::Tensor& x, const at::Tensor& alpha,
                                                               int64_t bits, int64_t channel_dim, bool codes);
at::Tensor staircase_relu_rebuild_meta(const at::Tensor& codes, const at::Tensor& alpha,
                                       c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                                       at::ScalarType dtype, int64_t bits, int64_t channel_dim,
                                       const at::Tensor& grad);
std::tuple<at::Tensor, at::Tensor> staircase_relu_backward_meta(
    const at::Tensor& grad, const at::Tensor& saved, const at::Tensor& alpha, c10::SymIntArrayRef size,
    c10::SymIntArrayRef stride, int64_t bits, std::string_view ste, std::string_view alpha_grad,
    int64_t channel_dim, bool codes);

// Bits for each element in what forward leaves.
int kept_bits(int64_t bits, bool codes);

// The channel dimension that alpha is laid along, none when alpha has one element.
std::optional<int64_t> alpha_channel_dim(const at::Tensor& x, const at::Tensor& alpha, int64_t channel_dim);

}  // namespace torchqat
