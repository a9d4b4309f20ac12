#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "torchqat/math/magnitude_histogram.h"
#include "torchqat/math/weight_fit.h"

// The least-squares scale of ternary weights without sorting them. Keeping the k largest magnitudes scores
// S_k / sqrt(k). A histogram gives that score at every bin edge and, by score_bound, the bins inside which a
// better k may lie; only their members are counted again, by a finer histogram. The result depends on the set
// of magnitudes alone, not on their order.
namespace torchqat::math {

// Magnitudes above `low` and up to `high`. By default all but 0, and with them what is not finite.
template <typename T>
struct MagnitudeWindow {
  T low = 0;
  T high = std::numeric_limits<T>::quiet_NaN();
};

template <typename T>
class TernarySearch {
 public:
  // Among all magnitudes, ...
  TernarySearch() = default;
  // ... or those in a window, what is above it being known.
  TernarySearch(const MagnitudeWindow<T>& window, const WeightFit& above)
      : lowest_(pattern_of(window.low) + 1),
        highest_(std::isnan(window.high) ? kLargest : pattern_of(window.high)),
        above_(above),
        best_(above) {}

  // Finds the best k, given all the magnitudes, in any order; uses them up.
  void run(std::vector<T>& kept) {
    if (kept.size() > kFewEnoughToSort) narrow_by_histograms(kept);
    sweep(kept);
    if (!std::isfinite(best_.overlap)) best_.overlap = std::numeric_limits<double>::quiet_NaN();
  }
  // NaN where a magnitude is infinite or NaN.
  const WeightFit& best() const { return best_; }

 private:
  static constexpr size_t kFewEnoughToSort = 512;
  static constexpr Pattern<T> kLargest = ~Pattern<T>{0} >> 1;

  void narrow_by_histograms(std::vector<T>& kept) {
    constexpr size_t kMembers = 64;  // of a bin: reading one costs as much as counting so many
    MagnitudeHistogram<T> histogram;
    size_t before = 0;
    do {
      before = kept.size();
      const int bits = std::bit_width(before / kMembers);
      histogram.restart(lowest_, highest_, std::min(bits, histogram.kMostBits));
      for (const T magnitude : kept) histogram.add(magnitude);
      if (!narrow(histogram)) return kept.clear();
      // In unsigned numbers one comparison tells both sides: which of them nobody could predict.
      std::erase_if(kept, [&](T m) { return pattern_of(m) - lowest_ > highest_ - lowest_; });
      // Many are left only where S_k / sqrt(k) is flat over many k, as in tails like 1 / sqrt(k).
    } while (kept.size() > kFewEnoughToSort && kept.size() < before / 2);
  }

  // Reads a histogram of all magnitudes in the window: keeps the best edge, and narrows the window to the
  // bins that may hold something better. False when none may.
  bool narrow(const MagnitudeHistogram<T>& histogram) {
    WeightFit fit = above_;
    for (int bin = histogram.bins(); bin-- > 0;) offer(fit = below_bin(fit, histogram, bin));
    if (!std::isfinite(fit.overlap)) best_ = fit;
    const double goal = best_.score() * (1 + kScoreSlack);
    bool found = false;
    fit = above_;
    for (int bin = histogram.bins(); bin-- > 0;) {
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
      found = true;
    }
    return found;
  }

  // Tries every k inside the window.
  void sweep(std::vector<T>& kept) {
    std::sort(kept.begin(), kept.end(), [](T a, T b) { return pattern_of(a) > pattern_of(b); });
    WeightFit fit = above_;
    for (const T magnitude : kept) offer(fit = {fit.energy + 1, fit.overlap + magnitude});
    if (!std::isfinite(fit.overlap)) best_ = fit;
  }

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
  Pattern<T> highest_ = kLargest;
  WeightFit above_;  // all magnitudes above the window
  WeightFit best_;
};

// The scale, given all magnitudes in any order; uses them up.
template <typename T>
double exact_ternary_scale(std::vector<T>& magnitudes) {
  TernarySearch<T> search;
  search.run(magnitudes);
  return search.best().scale();
}

}  // namespace torchqat::math
