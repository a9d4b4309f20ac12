#pragma once

#include <ATen/ATen.h>

#include "torchqat/macros.h"

namespace torchqat {

// Small integers without gaps between them. codes: uint8 of any shape and strides, in their row-major order;
// bits: 1, 2, 4 or 8. Result: [ceil(numel * bits / 8)], uint8, with code i in bits i * bits % 8 and up of
// byte i * bits / 8; bits of the last byte that no code fills are 0. On a CPU a code that has more bits is an
// error; on a GPU finding one would stall the device, so there its low bits are taken. Not differentiable.
TORCHQAT_API at::Tensor pack_codes(const at::Tensor& codes, int64_t bits);

// The codes again, of shape `size`. packed: [ceil(prod(size) * bits / 8)], uint8, any stride.
TORCHQAT_API at::Tensor unpack_codes(const at::Tensor& packed, int64_t bits, at::IntArrayRef size);

}  // namespace torchqat
