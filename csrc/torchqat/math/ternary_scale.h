#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "torchqat/math/magnitude_histogram.h"
#include "torchqat/math/weight_fit.h"

// The least-squares scale of ternary weights without sorting them. Keeping the k largest magnitudes scores
// S_k / sqrt(k). A histogram gives that score at every bin edge and, by score_bound, the bins inside which a
// better k may lie; only their members are counted again, by a finer histogram. The result depends on the set
// of magnitudes alone: neither on their order nor on how threads shared the counting.
namespace torchqat::math {

template <typename T>
class TernarySearch {
 public:
  // Reads a histogram of all magnitudes in the window: keeps the best edge, and narrows the window to the
  // bins that may hold something better. False when none may.
  bool narrow(const MagnitudeHistogram<T>& histogram) {
    WeightFit fit = above_;
    for (int bin = histogram.kBins; bin-- > 0;) offer(fit = below_bin(fit, histogram, bin));
    if (!std::isfinite(fit.overlap)) best_ = fit;
    const double goal = best_.score() * (1 + kScoreSlack);
    bool found = false;
    fit = above_;
    for (int bin = histogram.kBins; bin-- > 0;) {
      const WeightFit from = fit;
      fit = below_bin(from, histogram, bin);
      const double steep = magnitude_of<T>(histogram.highest(bin));
      const double shallow = magnitude_of<T>(histogram.lowest(bin));
      if (histogram.count(bin) == 0 || !(score_bound(from, fit, steep, shallow) > goal)) continue;
      if (!found) {
        highest_ = histogram.highest(bin);
        above_ = from;
      }
      lowest_ = histogram.lowest(bin);
      below_ = fit;
      found = true;
    }
    return found;
  }

  // Tries every k inside the window, given all magnitudes in it.
  void sweep(std::vector<T>& magnitudes) {
    std::sort(magnitudes.begin(), magnitudes.end(), [](T a, T b) { return pattern_of(a) > pattern_of(b); });
    WeightFit fit = above_;
    for (const T magnitude : magnitudes) offer(fit = {fit.energy + 1, fit.overlap + magnitude});
    if (!std::isfinite(fit.overlap)) best_ = fit;
  }

  // The window, and how many magnitudes it holds once narrow() has found one.
  Pattern<T> lowest() const { return lowest_; }
  Pattern<T> highest() const { return highest_; }
  bool holds(T value) const { return lowest_ <= pattern_of(value) && pattern_of(value) <= highest_; }

  size_t members() const { return static_cast<size_t>(below_.energy - above_.energy); }

  // NaN where a weight is infinite or NaN.
  double scale() const {
    return std::isfinite(best_.overlap) ? best_.scale() : std::numeric_limits<double>::quiet_NaN();
  }

 private:
  static WeightFit below_bin(WeightFit above, const MagnitudeHistogram<T>& histogram, int bin) {
    const int64_t count = histogram.count(bin);
    if (count == 0) return above;
    return {above.energy + static_cast<double>(count), above.overlap + histogram.sum(bin)};
  }
  void offer(const WeightFit& fit) {
    if (fit.score() > best_.score()) best_ = fit;
  }

  // The window: the best k, unless it is best_, is among the magnitudes with these patterns.
  Pattern<T> lowest_ = 0;
  Pattern<T> highest_ = ~Pattern<T>{0} >> 1;
  WeightFit above_;  // all magnitudes above the window
  WeightFit below_;  // and those in it as well
  WeightFit best_;
};

constexpr int64_t kFewEnoughToSort = 512;

// The scale from a histogram of all magnitudes, which is used up. gather(search, out) writes the magnitudes
// that search.holds() to out, search.members() of them, in any order; it may write one more. `kept` is
// scratch for them.
template <typename T, typename Gather>
double exact_ternary_scale(MagnitudeHistogram<T>& histogram, std::vector<T>& kept, Gather&& gather) {
  constexpr int kWorthwhile = 4;  // bits by which another histogram must be finer
  TernarySearch<T> search;
  if (!search.narrow(histogram)) return search.scale();
  kept.resize(search.members() + 1);
  gather(search, kept.data());
  kept.pop_back();
  while (kept.size() > kFewEnoughToSort) {
    const int shift = histogram.shift();
    histogram.restart(search.lowest(), search.highest());
    // A window stays wide only where S_k / sqrt(k) is flat over many k, as in tails like 1 / sqrt(k).
    if (histogram.shift() > 0 && shift - histogram.shift() < kWorthwhile) break;
    for (const T magnitude : kept) histogram.add(magnitude);
    if (!search.narrow(histogram)) return search.scale();
    std::erase_if(kept, [&](T magnitude) { return !search.holds(magnitude); });
  }
  search.sweep(kept);
  return search.scale();
}

// The same over n values in memory, whose signs do not matter. `kept` is scratch: at most n + 1 magnitudes.
template <typename T>
double exact_ternary_scale(const T* values, int64_t n, std::vector<T>& kept) {
  if (n <= kFewEnoughToSort) {
    TernarySearch<T> search;
    kept.assign(values, values + n);
    for (T& value : kept) value = std::abs(value);
    search.sweep(kept);
    return search.scale();
  }
  MagnitudeHistogram<T> histogram;
  for (int64_t i = 0; i < n; ++i) histogram.add(values[i]);
  return exact_ternary_scale(histogram, kept, [&](const TernarySearch<T>& search, T* out) {
    for (int64_t i = 0; i < n; ++i) {
      *out = std::abs(values[i]);
      out += search.holds(values[i]);
    }
  });
}

}  // namespace torchqat::math
