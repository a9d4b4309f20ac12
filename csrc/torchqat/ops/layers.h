#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace torchqat {

// What torchqat::nn calls of the private operators: torch's layers, which keep the codes of a staircase for
// backward where their input comes from one, and a module's step size.

// As torch.nn.functional.conv1d or conv2d, by the weight. With `recompute` a batch normalization that reads
// the result has it computed again in backward.
at::Tensor layer_convolution(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                             at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                             int64_t groups, bool recompute);
at::Tensor layer_linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias);
at::Tensor layer_max_pool2d(const at::Tensor& input, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                            at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode);
// In training, with running statistics.
at::Tensor layer_batch_norm(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                            const at::Tensor& running_mean, const at::Tensor& running_var, double momentum,
                            double eps);
// max(alpha, minimum), through which the gradient passes, multiplied by grad_scale and then clamped to
// +-grad_clip.
at::Tensor bounded_alpha(const at::Tensor& alpha, double minimum, double grad_scale, double grad_clip);

}  // namespace torchqat
