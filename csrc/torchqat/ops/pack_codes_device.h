#pragma once

#include <ATen/ATen.h>

// What the devices share of packed codes.
namespace torchqat {

// Check the arguments and allocate the results; every backend calls them first, and they are the Meta
// kernels.
at::Tensor pack_codes_meta(const at::Tensor& codes, int64_t bits);
at::Tensor unpack_codes_meta(const at::Tensor& packed, int64_t bits, c10::SymIntArrayRef size);

}  // namespace torchqat
