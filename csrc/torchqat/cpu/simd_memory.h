#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "torchqat/cpu/simd.h"

// Between vectors and memory of every dtype.
namespace torchqat::TORCHQAT_ISA {

// What values of type S are computed with.
template <typename S>
using OpMath = std::conditional_t<std::is_same_v<S, double>, double, float>;

template <typename To>
To read(const void* from) {
  To to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}

// As many values as a vector has, from and to any address.
inline Vec<float> load(const float* from) { return Vec<float>(read<Raw<float>>(from)); }
inline Vec<double> load(const double* from) { return Vec<double>(read<Raw<double>>(from)); }
inline void store(float* to, Vec<float> v) { std::memcpy(to, &v.raw, sizeof(v.raw)); }
inline void store(double* to, Vec<double> v) { std::memcpy(to, &v.raw, sizeof(v.raw)); }

typedef uint16_t HalfRaw __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t WordRaw __attribute__((vector_size(kVectorBytes)));

// Between halves and words, which are below 2^16. The compiler's own conversions take more instructions.
#if defined(__AVX512F__)
inline WordRaw widened(HalfRaw halves) {
  return bit_cast<WordRaw>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(halves)));
}
inline HalfRaw narrowed(WordRaw words) {
  return bit_cast<HalfRaw>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(words)));
}
#elif defined(__AVX2__)
inline WordRaw widened(HalfRaw halves) {
  return bit_cast<WordRaw>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(halves)));
}
inline HalfRaw narrowed(WordRaw words) {
  const auto packed = _mm256_packus_epi32(bit_cast<__m256i>(words), __m256i{});
  return bit_cast<HalfRaw>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000)));
}
#else
inline WordRaw widened(HalfRaw halves) { return __builtin_convertvector(halves, WordRaw); }
inline HalfRaw narrowed(WordRaw words) { return __builtin_convertvector(words, HalfRaw); }
#endif

inline Vec<float> load(const c10::BFloat16* from) {
  return Vec<float>(bit_cast<Raw<float>>(widened(read<HalfRaw>(from)) << 16));
}
// To the nearest, ties to even, by integers: conversion instructions flush small numbers to zero.
inline void store(c10::BFloat16* to, Vec<float> v) {
  const auto words = bit_cast<WordRaw>(v.raw);
  const auto rounded = (words + (0x7FFF + (words >> 16 & 1))) >> 16;
  const auto halves = narrowed(v.raw == v.raw ? rounded : 0x7FC0 - WordRaw{});
  std::memcpy(to, &halves, sizeof(halves));
}

#if defined(__AVX512F__)
inline Vec<float> load(const c10::Half* from) { return Vec<float>(_mm512_cvtph_ps(read<__m256i>(from))); }
inline void store(c10::Half* to, Vec<float> v) {
  const __m256i halves = _mm512_cvtps_ph(v.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(to, &halves, sizeof(halves));
}
#elif defined(__F16C__)
inline Vec<float> load(const c10::Half* from) { return Vec<float>(_mm256_cvtph_ps(read<__m128i>(from))); }
inline void store(c10::Half* to, Vec<float> v) {
  const __m128i halves = _mm256_cvtps_ph(v.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(to, &halves, sizeof(halves));
}
#else
inline Vec<float> load(const c10::Half* from) {
  Vec<float> v;
  for (int i = 0; i < Vec<float>::size; ++i) v.raw[i] = static_cast<float>(from[i]);
  return v;
}
inline void store(c10::Half* to, Vec<float> v) {
  for (int i = 0; i < Vec<float>::size; ++i) to[i] = static_cast<c10::Half>(v.raw[i]);
}
#endif

// Stores past the caches, where they do not hold the place in memory: without reading it first. `to` is
// aligned to a vector; halves are stored as ever. _mm_sfence() must come before another thread may read.
template <typename S, typename T>
void stream(S* to, Vec<T> v) {
  store(to, v);
}
#if defined(__AVX512F__)
inline void stream(float* to, Vec<float> v) { _mm512_stream_ps(to, v.raw); }
inline void stream(double* to, Vec<double> v) { _mm512_stream_pd(to, v.raw); }
#elif defined(__AVX2__)
inline void stream(float* to, Vec<float> v) { _mm256_stream_ps(to, v.raw); }
inline void stream(double* to, Vec<double> v) { _mm256_stream_pd(to, v.raw); }
#else
inline void stream(float* to, Vec<float> v) { _mm_stream_ps(to, v.raw); }
inline void stream(double* to, Vec<double> v) { _mm_stream_pd(to, v.raw); }
#endif
inline bool is_aligned(const void* to) { return reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0; }

// What is left of an array at its end, as a group: what is past `count` is 0.
template <typename S>
struct Padded {
  S values[kGroup] = {};

  Padded(const S* from, int64_t count) { std::copy_n(from, count, values); }
  operator const S*() const { return values; }
  operator S*() { return values; }
};

// Writes the lanes where the condition holds, one after the other, and returns the place behind them; it may
// write a whole vector.
#ifdef __AVX512F__
inline float* compress(float* to, Mask<float> condition, Vec<float> v) {
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(condition.bits, v.raw));
  return to + __builtin_popcount(condition.bits);
}
inline double* compress(double* to, Mask<double> condition, Vec<double> v) {
  _mm512_storeu_pd(to, _mm512_maskz_compress_pd(condition.bits, v.raw));
  return to + __builtin_popcount(condition.bits);
}
#else
template <typename T>
T* compress(T* to, Mask<T> condition, Vec<T> v) {
  for (unsigned left = to_bits(condition); left != 0; left &= left - 1) *to++ = v.raw[__builtin_ctz(left)];
  return to;
}
#endif

// Whole numbers of 0..255 as bytes.
#ifdef __AVX512F__
inline void store(uint8_t* to, Vec<float> v) {
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(v.raw));
  std::memcpy(to, &bytes, sizeof(bytes));
}
#else
inline void store(uint8_t* to, Vec<float> v) {
  const auto halves = narrowed(__builtin_convertvector(v.raw, WordRaw));
  using Bytes = uint8_t __attribute__((vector_size(sizeof(halves) / 2)));
  const auto bytes = __builtin_convertvector(halves, Bytes);
  std::memcpy(to, &bytes, sizeof(bytes));
}
#endif
inline void store(uint8_t* to, Vec<double> v) {
  for (int i = 0; i < Vec<double>::size; ++i) to[i] = static_cast<uint8_t>(v.raw[i]);
}

// Whole numbers of one or two bytes from and to vectors.
inline void store(uint16_t* to, Vec<float> v) {
  const auto halves = narrowed(__builtin_convertvector(v.raw, WordRaw));
  std::memcpy(to, &halves, sizeof(halves));
}
inline void store(uint16_t* to, Vec<double> v) {
  for (int i = 0; i < Vec<double>::size; ++i) to[i] = static_cast<uint16_t>(v.raw[i]);
}
template <typename T, typename Code>
Vec<T> load_codes(const Code* from) {
  Vec<T> v;
  for (int i = 0; i < Vec<T>::size; ++i) v.raw[i] = static_cast<T>(from[i]);
  return v;
}
template <>
inline Vec<float> load_codes(const uint16_t* from) {
  return Vec<float>(__builtin_convertvector(widened(read<HalfRaw>(from)), Raw<float>));
}
#if defined(__AVX512F__)
template <>
inline Vec<float> load_codes(const uint8_t* from) {
  return Vec<float>(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(read<__m128i>(from))));
}
#elif defined(__AVX2__)
template <>
inline Vec<float> load_codes(const uint8_t* from) {
  return Vec<float>(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(read<int64_t>(from)))));
}
#endif
}  // namespace torchqat::TORCHQAT_ISA
