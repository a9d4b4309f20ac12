#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string_view>

#include "torchqat/macros.h"

namespace torchqat {

// One step of blended coarse gradient descent (BCGD; Yin, Zhang, Lyu, Osher, Qi, Xin 2018) over lists of
// tensors, in place. A parameter holds the quantized weight w, latents[i] the float weight y that is trained.
// For each i, with g = grads[i] (its sign changed by `maximize`) divided by grad_scale:
//   y <- (1 - blend) y + blend w;   d <- g + weight_decay y;   d by momentum, dampening, nesterov as in
//   torch.optim.SGD;   y <- y - lr d;   scales[i], params[i] <- the projection of y to `bits` bits, as
//   quantize_weight's `method` does it.
// A parameter must hold what the step before, or quantize_weight, made of its latents and scale: at one bit w
// may be rebuilt from the two rather than read. `exact` at three bits and more searches around the scale that
// is there (math/bcgd.h), so start from quantize_weight's. scales[i]: 0-dim, or one per channel of
// `channel_dim`. momentum_buffers and steps (0-dim float32, the number of steps taken) are empty lists
// without momentum. lr: one element, on the CPU or on the parameters' device. Where found_inf is not 0
// nothing changes at all.
TORCHQAT_API void bcgd_step_(at::TensorList params, at::TensorList grads, at::TensorList latents,
                             at::TensorList scales, at::TensorList momentum_buffers, at::TensorList steps,
                             const at::Tensor& lr, int64_t bits,
                             std::optional<int64_t> channel_dim = std::nullopt,
                             std::string_view method = "exact", double momentum = 0.0, double dampening = 0.0,
                             double weight_decay = 0.0, bool nesterov = false, double blend = 1e-5,
                             bool maximize = false,
                             const std::optional<at::Tensor>& grad_scale = std::nullopt,
                             const std::optional<at::Tensor>& found_inf = std::nullopt);

}  // namespace torchqat
