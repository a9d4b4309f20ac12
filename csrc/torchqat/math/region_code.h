#pragma once

#include <cstdint>

#include "torchqat/math/macros.h"
#include "torchqat/math/staircase.h"

// The packed regions that the backward pass keeps: two bits per element in memory order, eight elements to a
// 16-bit word. The low byte holds bit 0 of each element's code, the high byte bit 1, element i at bit i:
// two byte masks, as a SIMD comparison leaves them.
namespace torchqat::math {

constexpr int kRegionsPerWord = 8;

TORCHQAT_HD constexpr int64_t region_words(int64_t n) { return (n + kRegionsPerWord - 1) / kRegionsPerWord; }

// The word's share of one element; the words of eight elements are or-ed together.
TORCHQAT_HD constexpr uint16_t region_word(Region region, int i) {
  const unsigned code = static_cast<unsigned>(region);
  return static_cast<uint16_t>(((code & 1u) | (code & 2u) << 7) << i);
}

TORCHQAT_HD constexpr Region region_at(uint16_t word, int i) {
  return static_cast<Region>((word >> i & 1) | (word >> (i + 7) & 2));
}

}  // namespace torchqat::math
