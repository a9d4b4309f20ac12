#pragma once

#include <cstdint>
#include <type_traits>

#include "torchqat/math/macros.h"

// What is kept of a staircase for backward, packed: a small number for each element, in memory order. It is
// the region of the element (two bits), or its state, which is its step index and its region in one
// (math/staircase.h) and serves all that reads the staircase's output too. Eight elements fill as many bytes
// as one has bits. Two bits lie in two planes, as SIMD comparisons leave them: bit 0 of each element in the
// first byte, bit 1 in the second. Wider numbers follow one another, the low bits first.
namespace torchqat::math {

constexpr int kCodesTogether = 8;

// Bits of a region, and of the 2^bits + 2 states of a staircase. With one bit its states are the regions.
constexpr int kRegionBits = 2;
TORCHQAT_HD constexpr int state_bits(int64_t bits) {
  return bits == 1 ? kRegionBits : bits <= 3 ? 4 : bits <= 7 ? 8 : 16;
}

// Bytes of n elements: whole groups of eight.
template <typename Int>
TORCHQAT_HD constexpr Int code_bytes(Int n, int code_bits) {
  return (n + (kCodesTogether - 1)) / kCodesTogether * code_bits;
}

// Element i of a group.
template <int bits>
TORCHQAT_HD constexpr unsigned code_at(const uint8_t* group, int i) {
  if constexpr (bits == 2) return (group[0] >> i & 1u) | (group[1] >> i & 1u) << 1;
  if constexpr (bits == 4) return group[i / 2] >> (i % 2 * 4) & 15u;
  if constexpr (bits == 8) return group[i];
  if constexpr (bits == 16) return group[2 * i] | static_cast<unsigned>(group[2 * i + 1]) << 8;
}

// Puts element i into a group that is 0 there.
template <int bits>
TORCHQAT_HD constexpr void put_code(uint8_t* group, int i, unsigned code) {
  if constexpr (bits == 2) {
    group[0] |= static_cast<uint8_t>((code & 1u) << i);
    group[1] |= static_cast<uint8_t>((code >> 1 & 1u) << i);
  }
  if constexpr (bits == 4) group[i / 2] |= static_cast<uint8_t>(code << (i % 2 * 4));
  if constexpr (bits == 8) group[i] = static_cast<uint8_t>(code);
  if constexpr (bits == 16) {
    group[2 * i] = static_cast<uint8_t>(code);
    group[2 * i + 1] = static_cast<uint8_t>(code >> 8);
  }
}

// Calls f(std::integral_constant<int, bits>) for the widths that there are.
template <typename F>
decltype(auto) with_code_bits(int bits, F&& f) {
  switch (bits) {
    case 2:
      return f(std::integral_constant<int, 2>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 8:
      return f(std::integral_constant<int, 8>());
    default:
      return f(std::integral_constant<int, 16>());
  }
}

}  // namespace torchqat::math
