// Compiled once for each instruction set, see simd.h: the compiler makes vectors of the loops.
#include "torchqat/cpu/pack_codes_kernels.h"

#include <cstring>

#include "torchqat/cpu/simd.h"
#include "torchqat/math/pack_codes.h"

namespace torchqat::TORCHQAT_ISA {
namespace {

constexpr int kWord = math::kCodesTogether;

template <typename Word>
Word read_word(const uint8_t* from, int64_t bytes = sizeof(Word)) {
  Word word = 0;
  std::memcpy(&word, from, bytes);
  return word;
}

template <int bits>
TORCHQAT_ALL_INLINE unsigned pack(const uint8_t* codes, uint8_t* packed, int64_t n) {
  const auto put = [&](int64_t i, uint64_t word, int64_t bytes) {
    const auto eight = math::pack_word<bits>(word);
    std::memcpy(packed + i * bits, &eight, bytes);
    return word;
  };
  uint64_t seen = 0;
  const int64_t words = n / kWord;
  for (int64_t i = 0; i < words; ++i) seen |= put(i, read_word<uint64_t>(codes + i * kWord), bits);
  const int64_t left = n % kWord;
  if (left > 0) {
    seen |= put(words, read_word<uint64_t>(codes + words * kWord, left), math::packed_bytes(left, bits));
  }
  for (int half = 32; half >= 8; half /= 2) seen |= seen >> half;
  return seen & 0xFF;
}

template <int bits>
TORCHQAT_ALL_INLINE void unpack(const uint8_t* packed, uint8_t* codes, int64_t n) {
  using Packed = math::PackedWord<bits>;
  const auto put = [&](int64_t i, Packed eight, int64_t bytes) {
    const uint64_t word = math::unpack_word<bits>(eight);
    std::memcpy(codes + i * kWord, &word, bytes);
  };
  const int64_t words = n / kWord;
  for (int64_t i = 0; i < words; ++i) put(i, read_word<Packed>(packed + i * bits), kWord);
  const int64_t left = n % kWord;
  if (left > 0) put(words, read_word<Packed>(packed + words * bits, math::packed_bytes(left, bits)), left);
}

unsigned pack_any(const uint8_t* codes, uint8_t* packed, int64_t bits, int64_t n) {
  return math::with_packed_bits(bits, [&](auto width) { return pack<width>(codes, packed, n); });
}

void unpack_any(const uint8_t* packed, uint8_t* codes, int64_t bits, int64_t n) {
  math::with_packed_bits(bits, [&](auto width) { unpack<width>(packed, codes, n); });
}

}  // namespace

const PackCodesKernels& pack_codes_kernels() {
  static constexpr PackCodesKernels kernels{pack_any, unpack_any};
  return kernels;
}

}  // namespace torchqat::TORCHQAT_ISA
