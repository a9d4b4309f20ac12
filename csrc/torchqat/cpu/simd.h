#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "torchqat/math/select.h"

// For a function with loops over vectors: all that it calls, however deep, becomes part of it. A call would
// pass vectors through memory, and could be linked into a file made for another instruction set.
#define TORCHQAT_ALL_INLINE [[gnu::flatten]]

// Vectors of the instruction set that a file is compiled for: SSE2, which every x86-64 processor has, AVX2 or
// AVX-512. A file that includes this is compiled once for each, with TORCHQAT_ISA as the name of a namespace,
// in which all that it defines must be. But for the payload of half-precision NaN, results are the same bit
// by bit.
namespace torchqat::TORCHQAT_ISA {

// Elements that are taken together on every instruction set, so that sums have one order: the widest vector
// of floats.
constexpr int kGroup = 16;

using math::at_least;
using math::at_most;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// The compiler's own vectors of T.
template <typename T>
struct RawVector {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Raw = typename RawVector<T>::type;
template <typename T>
using IntOf = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// What a comparison gives: a bit for each lane in AVX-512, else all bits of the lane or none.
template <typename T>
struct Mask {
#ifdef __AVX512F__
  using Bits = std::conditional_t<sizeof(T) == 8, __mmask8, __mmask16>;
#else
  using Bits = Raw<IntOf<T>>;
#endif
  Bits bits;

  Mask operator&(Mask other) const { return {static_cast<Bits>(bits & other.bits)}; }
  Mask operator!() const { return {static_cast<Bits>(~bits)}; }
};

// A comparison by operator, or by the predicate of an AVX-512 instruction.
#ifdef __AVX512F__
template <int predicate>
Mask<float> compare(Raw<float> a, Raw<float> b) {
  return {_mm512_cmp_ps_mask(a, b, predicate)};
}
template <int predicate>
Mask<double> compare(Raw<double> a, Raw<double> b) {
  return {_mm512_cmp_pd_mask(a, b, predicate)};
}
#define TORCHQAT_COMPARISON(op, predicate) \
  Mask<T> operator op(Vec b) const { return compare<predicate>(raw, b.raw); }
#else
#define TORCHQAT_COMPARISON(op, predicate) \
  Mask<T> operator op(Vec b) const { return {raw op b.raw}; }
#endif

template <typename T>
struct Vec {
  static constexpr int size = kVectorBytes / sizeof(T);

  Vec() = default;
  Vec(T value) : raw(value - Raw<T>{}) {}  // NOLINT: a number is a vector of equal numbers
  explicit Vec(Raw<T> lanes) : raw(lanes) {}

  Vec operator+(Vec b) const { return Vec(raw + b.raw); }
  Vec operator-(Vec b) const { return Vec(raw - b.raw); }
  Vec operator*(Vec b) const { return Vec(raw * b.raw); }
  Vec operator/(Vec b) const { return Vec(raw / b.raw); }
  Vec operator-() const { return Vec(-raw); }
  TORCHQAT_COMPARISON(<, _CMP_LT_OS)
  TORCHQAT_COMPARISON(>, _CMP_GT_OS)
  TORCHQAT_COMPARISON(<=, _CMP_LE_OS)
  TORCHQAT_COMPARISON(>=, _CMP_GE_OS)
  TORCHQAT_COMPARISON(==, _CMP_EQ_OQ)

  Raw<T> raw;
};
#undef TORCHQAT_COMPARISON

template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

#if defined(__AVX512F__)
constexpr int kUp = _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC;
constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
inline Vec<float> ceiling(Vec<float> x) { return Vec<float>(_mm512_roundscale_ps(x.raw, kUp)); }
inline Vec<float> nearest(Vec<float> x) { return Vec<float>(_mm512_roundscale_ps(x.raw, kNearest)); }
inline Vec<double> nearest(Vec<double> x) { return Vec<double>(_mm512_roundscale_pd(x.raw, kNearest)); }
inline Vec<double> ceiling(Vec<double> x) { return Vec<double>(_mm512_roundscale_pd(x.raw, kUp)); }
inline Vec<float> where(Mask<float> condition, Vec<float> yes, Vec<float> no) {
  return Vec<float>(_mm512_mask_blend_ps(condition.bits, no.raw, yes.raw));
}
inline Vec<double> where(Mask<double> condition, Vec<double> yes, Vec<double> no) {
  return Vec<double>(_mm512_mask_blend_pd(condition.bits, no.raw, yes.raw));
}
// One instruction each, which returns its second operand where one is NaN.
inline Vec<float> at_least(Vec<float> x, Vec<float> low) { return Vec<float>(_mm512_max_ps(low.raw, x.raw)); }
inline Vec<float> at_most(Vec<float> x, Vec<float> high) {
  return Vec<float>(_mm512_min_ps(high.raw, x.raw));
}
inline Vec<double> at_least(Vec<double> x, Vec<double> low) {
  return Vec<double>(_mm512_max_pd(low.raw, x.raw));
}
inline Vec<double> at_most(Vec<double> x, Vec<double> high) {
  return Vec<double>(_mm512_min_pd(high.raw, x.raw));
}
template <typename T>
unsigned to_bits(Mask<T> m) {
  return m.bits;
}
template <typename T>
Mask<T> from_bits(unsigned bits) {
  return {static_cast<typename Mask<T>::Bits>(bits)};
}
#else
template <typename T>
Vec<T> where(Mask<T> condition, Vec<T> yes, Vec<T> no) {
  return Vec<T>(condition.bits ? yes.raw : no.raw);
}
// Lane i is set where bit i is.
template <typename T>
Mask<T> from_bits(unsigned bits) {
  Raw<IntOf<T>> lane;
  for (int i = 0; i < Vec<T>::size; ++i) lane[i] = IntOf<T>{1} << i;
  return {(lane & static_cast<IntOf<T>>(bits)) == lane};
}
#if defined(__AVX2__)
inline Vec<float> ceiling(Vec<float> x) { return Vec<float>(_mm256_ceil_ps(x.raw)); }
inline Vec<double> ceiling(Vec<double> x) { return Vec<double>(_mm256_ceil_pd(x.raw)); }
inline Vec<float> nearest(Vec<float> x) {
  return Vec<float>(_mm256_round_ps(x.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Vec<double> nearest(Vec<double> x) {
  return Vec<double>(_mm256_round_pd(x.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline unsigned to_bits(Mask<float> m) { return _mm256_movemask_ps(bit_cast<__m256>(m.bits)); }
inline unsigned to_bits(Mask<double> m) { return _mm256_movemask_pd(bit_cast<__m256d>(m.bits)); }
#else
// Through an integer, which holds all levels that there are; NaN stays.
template <typename T>
Vec<T> ceiling(Vec<T> x) {
  using Int = Raw<IntOf<T>>;
  const Vec<T> whole(__builtin_convertvector(__builtin_convertvector(x.raw, Int), Raw<T>));
  const Vec<T> up = where(whole < x, whole + Vec<T>(1), whole);
  return where(x == x, up, x);
}
// Of what is not negative and below the number from which on the format has whole numbers alone.
inline Vec<float> nearest(Vec<float> x) { return (x + Vec<float>(0x1p23F)) - Vec<float>(0x1p23F); }
inline Vec<double> nearest(Vec<double> x) { return (x + Vec<double>(0x1p52)) - Vec<double>(0x1p52); }
inline unsigned to_bits(Mask<float> m) { return _mm_movemask_ps(bit_cast<__m128>(m.bits)); }
inline unsigned to_bits(Mask<double> m) { return _mm_movemask_pd(bit_cast<__m128d>(m.bits)); }
#endif
#endif

template <typename T>
Vec<T> small_ceiling(Vec<T> x) {
  return ceiling(x);
}
template <typename T>
Vec<T> magnitude(Vec<T> x) {
  const IntOf<T> sign = std::numeric_limits<IntOf<T>>::min();
  return Vec<T>(bit_cast<Raw<T>>(bit_cast<Raw<IntOf<T>>>(x.raw) & ~sign));
}
template <typename T>
T largest(Vec<T> x) {
  T found = x.raw[0];
  for (int i = 1; i < Vec<T>::size; ++i) found = x.raw[i] > found ? x.raw[i] : found;
  return found;
}
}  // namespace torchqat::TORCHQAT_ISA
