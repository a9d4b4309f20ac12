#pragma once

#include <cstdint>

#include "torchqat/math/macros.h"
#include "torchqat/math/region_code.h"

// What is kept of a staircase for its own backward pass and for all that reads its output: the states of its
// elements (math/staircase.h), in memory order, in so many bits each that eight elements fill whole bytes.
namespace torchqat::math {

// Bits that hold 2^bits + 2 states. With one bit the states are the regions, and are packed as those are.
constexpr int kRegionBits = 2;
TORCHQAT_HD constexpr int step_code_bits(int64_t bits) {
  return bits == 1 ? kRegionBits : bits <= 3 ? 4 : bits <= 7 ? 8 : 16;
}

// Bytes of n elements.
template <typename Int>
TORCHQAT_HD constexpr Int step_code_bytes(Int n, int code_bits) {
  return code_bits == kRegionBits ? (n + 7) / 8 * 2 : (n * code_bits + 7) / 8;
}

}  // namespace torchqat::math
