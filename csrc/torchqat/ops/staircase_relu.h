#pragma once

#include <ATen/ATen.h>

#include <string>
#include <string_view>
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

}  // namespace torchqat
