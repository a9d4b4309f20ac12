#pragma once

#include <cstdint>
#include <type_traits>

#include "torchqat/math/macros.h"
#include "torchqat/math/step_codes.h"

// Codes of b = 1, 2, 4 or 8 bits without gaps between them, for users, files and other programs: code i is in
// bits i * b % 8 and up of byte i * b / 8. Eight codes, which are the bytes of a little-endian word before,
// fill b bytes. (What a staircase keeps, which nobody else reads, is packed as its kernels like it:
// step_codes.h.)
namespace torchqat::math {

// An integer of as many bytes as a code has bits: eight codes, packed.
template <int bits>
using PackedWord = std::conditional_t<
    bits == 1, uint8_t,
    std::conditional_t<bits == 2, uint16_t, std::conditional_t<bits == 4, uint32_t, uint64_t>>>;

// Bytes of n codes; the last one may be filled in part.
template <typename Int>
TORCHQAT_HD constexpr Int packed_bytes(Int n, int64_t bits) {
  const int64_t per_byte = 8 / bits;
  return (n + (per_byte - 1)) / per_byte;
}

// A word in which the low `width` bits of every `step` bits are set.
template <int width, int step>
constexpr uint64_t kLowBits = ~uint64_t{0} / (~uint64_t{0} >> (64 - step)) * (~uint64_t{0} >> (64 - width));

// The number in the low `width` bits of every `step` bits, each moved down to the one below it, ...
template <int width, int step>
TORCHQAT_HD constexpr uint64_t closed_up(uint64_t numbers) {
  if constexpr (step == 64) return numbers;
  if constexpr (step < 64) {
    const uint64_t pairs = (numbers | numbers >> (step - width)) & kLowBits<2 * width, 2 * step>;
    return closed_up<2 * width, 2 * step>(pairs);
  }
}

// ... and moved apart again, from `width` bits in every `step` to `bits` in every byte.
template <int bits, int width, int step>
TORCHQAT_HD constexpr uint64_t spread_out(uint64_t numbers) {
  if constexpr (step == 8) return numbers;
  if constexpr (step > 8) {
    const uint64_t halves = (numbers | numbers << (step - width) / 2) & kLowBits<width / 2, step / 2>;
    return spread_out<bits, width / 2, step / 2>(halves);
  }
}

// The low `bits` bits of each byte.
template <int bits>
TORCHQAT_HD constexpr PackedWord<bits> pack_word(uint64_t codes) {
  return static_cast<PackedWord<bits>>(closed_up<bits, 8>(codes & kLowBits<bits, 8>));
}

template <int bits>
TORCHQAT_HD constexpr uint64_t unpack_word(PackedWord<bits> packed) {
  return spread_out<bits, 8 * bits, 64>(packed);
}

// Calls f(std::integral_constant<int, bits>) for the widths that there are.
template <typename F>
decltype(auto) with_packed_bits(int64_t bits, F&& f) {
  switch (bits) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 4:
      return f(std::integral_constant<int, 4>());
    default:
      return f(std::integral_constant<int, 8>());
  }
}

}  // namespace torchqat::math
