#pragma once

#include <cstdint>

#include "torchqat/cpu/instruction_set.h"

// The loops of pack_codes and unpack_codes over raw memory, for one thread: `n` codes of 1, 2, 4 or 8 bits,
// from the beginning of a byte on.
namespace torchqat {

// Fills math::packed_bytes(n, bits) bytes. Returns the bitwise or of all codes.
using PackCodes = unsigned (*)(const uint8_t* codes, uint8_t* packed, int64_t bits, int64_t n);
using UnpackCodes = void (*)(const uint8_t* packed, uint8_t* codes, int64_t bits, int64_t n);

struct PackCodesKernels {
  PackCodes pack;
  UnpackCodes unpack;
};

#define DECLARE(isa)                            \
  namespace isa {                               \
  const PackCodesKernels& pack_codes_kernels(); \
  }
TORCHQAT_FOR_EACH_ISA(DECLARE)
#undef DECLARE

}  // namespace torchqat
