#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "torchqat/math/macros.h"

namespace torchqat::math {

// The bits of |value|, read as an integer: they have the order of the magnitudes themselves.
template <typename T>
using Pattern = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

template <typename T>
TORCHQAT_HD Pattern<T> pattern_of(T value) {
  Pattern<T> bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & (~Pattern<T>{0} >> 1);
}

template <typename T>
TORCHQAT_HD T magnitude_of(Pattern<T> bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Counts and sums of magnitudes by the leading bits of their patterns, within the window of patterns
// [first << shift, (first + bins()) << shift). A bin lies inside one binade, where a magnitude is linear in
// its pattern, so the sums are kept as integers: exact, whatever the order and the grouping of the additions.
template <typename T>
class MagnitudeHistogram {
 public:
  static constexpr int kMostBits = 11;  // float: 8 bits of exponent and 3 of mantissa; double: the exponent
  static constexpr int kWidestShift = 8 * sizeof(T) - 1 - kMostBits;

  // Empties it, and makes up to 2^bits bins for the patterns of [lowest, highest].
  void restart(Pattern<T> lowest, Pattern<T> highest, int bits) {
    for (shift_ = 0; ((highest >> shift_) - (lowest >> shift_)) >> bits != 0;) ++shift_;
    // A bin must not span binades.
    shift_ = std::min(shift_, kWidestShift);
    first_ = lowest >> shift_;
    bins_.assign((highest >> shift_) - first_ + 1, Bin{});
  }

  // The value must lie in the window.
  void add(T value) {
    const Pattern<T> bits = pattern_of(value);
    Bin& bin = bins_[(bits >> shift_) - first_];
    ++bin.count;
    bin.offsets += bits - (bits >> shift_ << shift_);
  }

  int bins() const { return static_cast<int>(bins_.size()); }
  int64_t count(int bin) const { return bins_[bin].count; }
  Pattern<T> lowest(int bin) const { return (first_ + bin) << shift_; }
  Pattern<T> highest(int bin) const { return lowest(bin) + ((Pattern<T>{1} << shift_) - 1); }

  double sum(int bin) const {
    const double base = magnitude_of<T>(lowest(bin));
    if (bins_[bin].offsets == 0) return base * static_cast<double>(count(bin));
    const double spacing = static_cast<double>(magnitude_of<T>(lowest(bin) + 1)) - base;
    return base * static_cast<double>(count(bin)) + spacing * static_cast<double>(bins_[bin].offsets);
  }

 private:
  // Offsets have up to 20 bits for float and 52 for double: the sum of the latter needs more than 64.
  __extension__ typedef unsigned __int128 Wide;  // not in ISO C++, and without a warning by -Wpedantic
  using Offsets = std::conditional_t<sizeof(T) == 4, uint64_t, Wide>;
  struct Bin {
    int64_t count = 0;
    Offsets offsets = 0;
  };

  Pattern<T> first_ = 0;
  int shift_ = 0;
  std::vector<Bin> bins_;
};

}  // namespace torchqat::math
