#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string_view>
#include <tuple>

#include "torchqat/macros.h"

namespace torchqat {

// Quantizes weights to scale * level: levels +-1 at one bit (sign(0) = +1), else 0, +-1 .. +-(2^(bits-1) -
// 1), so that two bits are ternary. One scale for all, or one for each channel of `channel_dim`. Returns the
// quantized weights (weight's shape, dtype, layout) and the scale (0-dim or [channels]; float32 for the half
// precisions). `method`: "exact", the least-squares optimum at every width; "lloyd", one step from the
// papers' start 2 max|w| / (2^bits - 1); "twn" (bits = 2), keeping what is at least 0.7 mean|w|. Not
// differentiable. Zero weights give scale 0; NaN or infinity (or a float64 sum that overflows) gives NaN.
TORCHQAT_API std::tuple<at::Tensor, at::Tensor> quantize_weight(
    const at::Tensor& weight, int64_t bits, std::string_view method = "exact",
    std::optional<int64_t> channel_dim = std::nullopt);

// The levels themselves, int8: the nearest to weight / scale, ties towards zero. For weights that are
// quantized already these are the levels they have. Where the scale is not > 0, and for NaN, 0 (one bit: the
// sign).
TORCHQAT_API at::Tensor weight_codes(const at::Tensor& weight, const at::Tensor& scale, int64_t bits,
                                     std::optional<int64_t> channel_dim = std::nullopt);

}  // namespace torchqat
