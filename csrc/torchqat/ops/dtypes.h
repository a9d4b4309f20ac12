#pragma once

#include <c10/core/ScalarType.h>

namespace torchqat {

// The dtypes of values that operators compute with.
inline bool is_supported(at::ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
}
constexpr const char* kSupportedDtypes = "float64, float32, bfloat16 or float16";

}  // namespace torchqat
