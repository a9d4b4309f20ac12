#pragma once

#include "launch.cuh"
#include "torchqat/math/magnitude_histogram.h"
#include "torchqat/math/weight_fit.h"

// The data of the search for the least-squares scale of ternary weights without sorting them, by the search
// of math/ternary_scale.h: histograms by the leading bits of the magnitudes give the score at every bin edge
// and, by score_bound, the bins inside which a better one may lie; those are looked at by finer bins. A round
// begins with all magnitudes in kWindows windows and follows the highest kWindows bins of each level down to
// single patterns; where there were more, another round begins below them, so what remains is the optimum.
// Counts and sums are integers: exact, in any order.
namespace torchqat::cuda {

constexpr int kWindows = 8;
constexpr int kWindowBits = 8;
constexpr int kWindowBins = 1 << kWindowBits;
static_assert(kWindows * 32 == kThreads, "a warp for each window");

// Bins at level l hold the patterns that agree above bit ternary_shift(l): at first one binade or a part of
// it, in which a magnitude is linear in its pattern, at the last level single patterns. Windows hold what
// agrees above bit ternary_shift(l - 1).
template <typename T>
TORCHQAT_HD constexpr int ternary_shift(int level) {
  const int shift = math::MagnitudeHistogram<T>::kWidestShift - level * kWindowBits;
  return shift > 0 ? shift : 0;
}
template <typename T>
TORCHQAT_HD constexpr int ternary_levels() {
  int levels = 1;
  while (ternary_shift<T>(levels - 1) > 0) ++levels;
  return levels;
}

// A WeightFit without a constructor, as shared memory wants it.
struct PlainFit {
  double energy, overlap;

  __device__ PlainFit& operator=(const math::WeightFit& fit) {
    energy = fit.energy;
    overlap = fit.overlap;
    return *this;
  }
  __device__ operator math::WeightFit() const { return {energy, overlap}; }
};

// How far the search for one scale has come.
template <typename T>
struct TernaryState {
  PlainFit best;
  PlainFit above[kWindows];           // all that is above each window
  math::Pattern<T> prefix[kWindows];  // the leading bits of what is in it; the highest window is the first
  math::Pattern<T> settled;           // from here up there is nothing better than `best`
  math::Pattern<T> skipped;           // the end of the windows that were followed; 0 where all were
  int windows;

  // The beginning of a round: all patterns, by their leading three bits.
  __device__ void restart(math::Pattern<T> settled_from) {
    windows = kWindows;
    for (int i = 0; i < kWindows; ++i) prefix[i] = kWindows - 1 - i;
    settled = settled_from;
    skipped = 0;
  }
  __device__ void start() {
    best = math::WeightFit{};
    restart(math::Pattern<T>{1} << (8 * sizeof(T) - 1));
  }
};

// Counts of the bins of all windows, and the sums of how far their members are from the lowest pattern of the
// bin. For double those sums need more than 64 bits and are kept in two parts.
template <typename T>
struct TernaryBins {
  static constexpr int kBins = kWindows * kWindowBins;
  static constexpr bool kTwoParts = sizeof(T) == 8;
  static constexpr int kLowBits = 26;

  unsigned count[kBins];
  unsigned long long low[kBins];
  unsigned long long high[kTwoParts ? kBins : 1];

  __device__ void clear() {
    for (int i = threadIdx.x; i < kBins; i += kThreads) {
      count[i] = 0;
      low[i] = 0;
      if constexpr (kTwoParts) high[i] = 0;
    }
  }

  __device__ void add(const TernaryState<T>& state, T value, int level) {
    const auto pattern = math::pattern_of(value);
    const int shift = ternary_shift<T>(level);
    const int digits = ternary_shift<T>(level - 1) - shift;
    const auto digit = pattern >> shift & ((1 << digits) - 1);
    const auto offset = static_cast<unsigned long long>(pattern - (pattern >> shift << shift));
    for (int w = 0; w < state.windows; ++w) {
      if (pattern >> (shift + digits) != state.prefix[w]) continue;
      const int bin = w * kWindowBins + static_cast<int>(digit);
      atomicAdd(&count[bin], 1u);
      atomicAdd(&low[bin], kTwoParts ? offset & ((1ull << kLowBits) - 1) : offset);
      if constexpr (kTwoParts) atomicAdd(&high[bin], offset >> kLowBits);
    }
  }

  // Adds what this block has counted.
  __device__ void add(const TernaryBins& other) {
    for (int i = threadIdx.x; i < kBins; i += kThreads) {
      if (other.count[i] == 0) continue;
      atomicAdd(&count[i], other.count[i]);
      atomicAdd(&low[i], other.low[i]);
      if constexpr (kTwoParts) atomicAdd(&high[i], other.high[i]);
    }
  }

  // All members of a bin that begins at the pattern `lowest`.
  __device__ math::WeightFit fit(int bin, math::Pattern<T> lowest) const {
    const double n = count[bin];
    if (n == 0) return {};
    const double base = math::magnitude_of<T>(lowest);
    const double spacing = static_cast<double>(math::magnitude_of<T>(lowest + 1)) - base;
    double offsets = static_cast<double>(low[bin]);
    if constexpr (kTwoParts) offsets += static_cast<double>(high[bin]) * (1 << kLowBits);
    return {n, base * n + (offsets == 0 ? 0.0 : spacing * offsets)};
  }
};

}  // namespace torchqat::cuda
