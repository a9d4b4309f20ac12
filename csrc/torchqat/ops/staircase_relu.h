#pragma once

#include <ATen/ATen.h>

#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "torchqat/macros.h"

namespace torchqat {

// Quantizes activations to the b-bit staircase ReLU of step size alpha: 0 for x <= 0, else
// alpha * min(ceil(x / alpha), 2^bits - 1). Backward uses the straight-through estimator `ste` for x and the
// rule `alpha_grad` for alpha. alpha: one element, or one per channel of `channel_dim`. Result: x's shape,
// dtype, layout. With `save_codes` backward keeps the step codes, which layers that read y then need not keep
// y for.
TORCHQAT_API at::Tensor staircase_relu(const at::Tensor& x, const at::Tensor& alpha, int64_t bits = 4,
                                       std::string_view ste = "clipped_relu",
                                       std::string_view alpha_grad = "three_valued", int64_t channel_dim = 1,
                                       bool save_codes = false);

// The step index of each element, uint8. NaN (of x, or by an alpha that is not > 0) has no step: its code is
// 0.
TORCHQAT_API at::Tensor staircase_codes(const at::Tensor& x, const at::Tensor& alpha, int64_t bits = 4,
                                        int64_t channel_dim = 1);

// The straight-through estimators that `ste` can name.
TORCHQAT_API std::vector<std::string> ste_names();

// Checks the arguments of the operators above and allocates the result; every backend calls it first, and it
// is the Meta kernel. `op` is the name that the error messages give.
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
