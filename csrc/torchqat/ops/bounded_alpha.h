#pragma once

#include <ATen/ATen.h>

#include "torchqat/macros.h"

namespace torchqat {

// max(alpha, minimum), through which the gradient passes also where the bound acts, multiplied by grad_scale and then
// clamped to +-grad_clip: the training habits of BCGD's authors for a learnable step size, kept out of the operators
// that state the mathematics.
TORCHQAT_API at::Tensor bounded_alpha(const at::Tensor& alpha, double minimum, double grad_scale, double grad_clip);

}  // namespace torchqat
