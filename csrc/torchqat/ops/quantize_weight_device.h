#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "torchqat/math/weight_method.h"

// What the devices share of quantized weights.
namespace torchqat {

// Check the arguments and allocate the results; every backend calls them first, and they are the Meta
// kernels.
std::tuple<at::Tensor, at::Tensor> quantize_weight_meta(const at::Tensor& weight, int64_t bits,
                                                        std::string_view method,
                                                        std::optional<int64_t> channel_dim);
at::Tensor weight_codes_meta(const at::Tensor& weight, const at::Tensor& scale, int64_t bits,
                             std::optional<int64_t> channel_dim);

// The method called `name`; raises in the name of `op` when there is none, or none for that many bits.
math::WeightMethod weight_method(std::string_view op, std::string_view name, int64_t bits);

// channel_dim counted from the front.
std::optional<int64_t> wrapped(std::optional<int64_t> channel_dim, const at::Tensor& weight);

}  // namespace torchqat
