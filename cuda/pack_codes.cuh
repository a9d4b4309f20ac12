#pragma once

#include "launch.cuh"
#include "torchqat/math/pack_codes.h"

// Kernels of pack_codes and unpack_codes and their launches, over raw pointers. A thread takes 32 codes at a
// time: with 8 bits 16 bytes twice, with one bit 16 bytes twice on one side and a word on the other.
namespace torchqat::cuda {

constexpr int kPackedAtOnce = 4;  // words of eight codes

// The bytes that are there of some words, the others 0.
template <typename Word>
__device__ __forceinline__ Pack<Word, kPackedAtOnce> load_words(const uint8_t* from, int64_t bytes,
                                                                bool aligned) {
  using Words = Pack<Word, kPackedAtOnce>;
  if (aligned && bytes >= int64_t{sizeof(Words)}) {
    return load_pack<kPackedAtOnce>(reinterpret_cast<const Word*>(from));
  }
  Words words{};
  TORCHQAT_UNROLL
  for (int i = 0; i < int{sizeof(Words)}; ++i) {
    if (i < bytes) words[i / sizeof(Word)] |= static_cast<Word>(Word{from[i]} << i % sizeof(Word) * 8);
  }
  return words;
}

template <typename Word>
__device__ __forceinline__ void store_words(uint8_t* to, int64_t bytes,
                                            const Pack<Word, kPackedAtOnce>& words) {
  if (bytes >= int64_t{sizeof(words)}) return store_pack(reinterpret_cast<Word*>(to), words);
  TORCHQAT_UNROLL
  for (int i = 0; i < int{sizeof(words)}; ++i) {
    if (i < bytes) to[i] = static_cast<uint8_t>(words[i / sizeof(Word)] >> i % sizeof(Word) * 8);
  }
}

// map(word) for all words of `from`, into the aligned `to`.
template <typename From, typename To, typename Map>
__device__ __forceinline__ void map_words(const uint8_t* from, int64_t from_bytes, uint8_t* to,
                                          int64_t to_bytes, bool aligned, Map map) {
  constexpr int64_t kFrom = kPackedAtOnce * sizeof(From);
  constexpr int64_t kTo = kPackedAtOnce * sizeof(To);
  for (int64_t g = grid_thread(); g * kFrom < from_bytes; g += grid_threads()) {
    const auto in = load_words<From>(from + g * kFrom, from_bytes - g * kFrom, aligned);
    Pack<To, kPackedAtOnce> out;
    TORCHQAT_UNROLL
    for (int i = 0; i < kPackedAtOnce; ++i) out[i] = map(in[i]);
    store_words(to + g * kTo, to_bytes - g * kTo, out);
  }
}

template <int bits>
__global__ void __launch_bounds__(kThreads)
    pack_codes_kernel(const uint8_t* __restrict__ codes, uint8_t* __restrict__ packed, int64_t n,
                      bool aligned) {
  map_words<uint64_t, math::PackedWord<bits>>(codes, n, packed, math::packed_bytes(n, bits), aligned,
                                              [](uint64_t word) { return math::pack_word<bits>(word); });
}

template <int bits>
__global__ void __launch_bounds__(kThreads)
    unpack_codes_kernel(const uint8_t* __restrict__ packed, uint8_t* __restrict__ codes, int64_t n,
                        bool aligned) {
  using Packed = math::PackedWord<bits>;
  map_words<Packed, uint64_t>(packed, math::packed_bytes(n, bits), codes, n, aligned,
                              [](Packed word) { return math::unpack_word<bits>(word); });
}

// n codes; the side that is written begins at a multiple of 16 bytes.
template <int bits>
cudaError_t launch_pack_codes(const uint8_t* codes, uint8_t* packed, int64_t n, cudaStream_t stream) {
  return launch(pack_codes_kernel<bits>, blocks_for(n, kPackedAtOnce * math::kCodesTogether), stream, codes,
                packed, n, pack_aligned<kPackedAtOnce>(reinterpret_cast<const uint64_t*>(codes)));
}

template <int bits>
cudaError_t launch_unpack_codes(const uint8_t* packed, uint8_t* codes, int64_t n, cudaStream_t stream) {
  using Packed = math::PackedWord<bits>;
  return launch(unpack_codes_kernel<bits>, blocks_for(n, kPackedAtOnce * math::kCodesTogether), stream,
                packed, codes, n, pack_aligned<kPackedAtOnce>(reinterpret_cast<const Packed*>(packed)));
}

}  // namespace torchqat::cuda
