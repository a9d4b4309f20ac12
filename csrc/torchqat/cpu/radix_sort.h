#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "torchqat/math/magnitude_histogram.h"

namespace torchqat {

// Sorts magnitudes in descending order. From a few thousand on by their bits, eleven at a time, which is
// several times faster than by comparisons and takes as much memory again while it runs.
template <typename T>
void sort_magnitudes(std::vector<T>& magnitudes) {
  constexpr int kDigitBits = 11;
  constexpr size_t kDigits = size_t{1} << kDigitBits;
  constexpr int kPasses = (8 * sizeof(T) - 1 + kDigitBits - 1) / kDigitBits;
  constexpr size_t kFew = 2048;
  const size_t n = magnitudes.size();
  if (n < kFew) return std::sort(magnitudes.begin(), magnitudes.end(), std::greater<T>());

  const auto digit = [](T magnitude, int pass) {
    return static_cast<size_t>(math::pattern_of(magnitude) >> (pass * kDigitBits)) % kDigits;
  };
  std::vector<std::array<size_t, kDigits>> counts(kPasses);
  for (const T m : magnitudes) {
    for (int pass = 0; pass < kPasses; ++pass) ++counts[pass][digit(m, pass)];
  }
  const auto other = std::make_unique_for_overwrite<T[]>(n);
  T* from = magnitudes.data();
  T* to = other.get();
  for (int pass = 0; pass < kPasses; ++pass) {
    auto& places = counts[pass];
    if (places[digit(from[0], pass)] == n) continue;  // all have the same digit
    size_t place = 0;
    for (size_t d = kDigits; d-- > 0;) place += std::exchange(places[d], place);
    for (size_t i = 0; i < n; ++i) to[places[digit(from[i], pass)]++] = from[i];
    std::swap(from, to);
  }
  if (from != magnitudes.data()) std::copy_n(from, n, magnitudes.data());
}

}  // namespace torchqat
