#pragma once

#include <cmath>
#include <cstdint>

#include "torchqat/math/macros.h"
#include "torchqat/math/weight_fit.h"

// The least-squares scale for levels 0..top. For step size t the magnitudes from (j - 1/2) t on have level j
// or more; as t falls, one magnitude after the other moves up by a level, at the breakpoints |w| / (j - 1/2).
// From sorted magnitudes and their prefix sums, the assignment at any t takes one binary search per level.
// Branch and bound over t, with score_bound between two assignments, finds the best of all breakpoints in a
// few hundred of them.
namespace torchqat::math {

// What a step size t assigns, and the breakpoints next to it.
struct StepState {
  WeightFit fit;
  double above = HUGE_VAL;  // the smallest breakpoint >= t, of those in the interval that t splits
  double below = 0;         // the largest breakpoint < t, of those

  // The state that two members of a team, each with levels of its own, have found together.
  TORCHQAT_HD StepState operator+(const StepState& other) const {
    return {fit + other.fit, std::fmin(above, other.above), std::fmax(below, other.below)};
  }
};

// Weights: size(), and of the magnitudes in descending order magnitude(i) and sum_of_first(count).
// Team: the threads that search together, each for the levels first_level(), first_level() + stride(), ..; at
// most kOwnLevels of them. join() adds up what they found, in a fixed order, and gives the sum to all.
template <typename Weights, typename Team>
class ExactScaleSearch {
 public:
  TORCHQAT_HD ExactScaleSearch(const Weights& weights, int top, Team& team)
      : weights_(weights), top_(top), team_(team) {}

  // The best assignment; energy 0 where all weights are zero.
  TORCHQAT_HD WeightFit best() {
    const double smallest_positive = 4.9406564584124654e-324;
    const int64_t n = count_from(0, weights_.size(), smallest_positive);
    if (n == 0) return {};
    // Above the largest breakpoint no weight has a level, at the smallest one all have the highest.
    enter(0, {{}, HUGE_VAL, weights_.magnitude(0) / 0.5}, 0);
    const double top = top_;
    enter(1, {{top * top * n, top * weights_.sum_of_first(n)}, weights_.magnitude(n - 1) / (top - 0.5), 0},
          n);
    best_ = states_[1].fit;
    for (int depth = 1; depth > 0;) {
      if (split(depth)) {
        ++depth;
      } else {
        copy(depth, 0);
        --depth;
      }
    }
    return best_;
  }

 private:
  // Geometric halves of intervals go down from the range of a double to neighbouring doubles in fewer splits.
  static constexpr int kDepth = 80;

  // How many magnitudes are at least `threshold`, given that the first `from` are and that from `to` on none
  // is.
  TORCHQAT_HD int64_t count_from(int64_t from, int64_t to, double threshold) const {
    // A choice of number, not of path: processors cannot predict which half it is.
    for (int64_t left = to - from; left > 0;) {
      const int64_t half = (left + 1) / 2;
      from += weights_.magnitude(from + half - 1) >= threshold ? half : 0;
      left -= half;
    }
    return from;
  }

  // Slot 0 is the upper end of the interval in hand, slots 1, 2, .. are lower ends, the last one nearest to
  // it.
  TORCHQAT_HD void enter(int slot, const StepState& state, int64_t count) {
    states_[slot] = state;
    for (int own = 0; own < Team::kOwnLevels; ++own) counts_[slot][own] = count;
  }
  TORCHQAT_HD void copy(int from, int to) {
    states_[to] = states_[from];
    for (int own = 0; own < Team::kOwnLevels; ++own) counts_[to][own] = counts_[from][own];
  }

  // Puts the state between slot 0 and slot `depth` on top of the stack. False when none there can be the
  // best.
  TORCHQAT_HD bool split(int depth) {
    const StepState& upper = states_[0];
    const StepState& lower = states_[depth];
    const double high = upper.below;
    const double low = lower.above;
    if (!(low < high) || depth + 1 == kDepth) return false;
    // A step of 2j - 1 in energy adds the magnitude (j - 1/2) t to the overlap.
    const double bound = score_bound(upper.fit, lower.fit, high / 2, low / 2);
    if (!(bound > best_.score() * (1 + kScoreSlack))) return false;
    const double middle = low > 0 ? std::fmin(std::sqrt(low) * std::sqrt(high), high) : high / 2;
    const StepState state = evaluate(middle > low ? middle : high, depth);
    states_[depth + 1] = state;
    if (state.fit.score() > best_.score()) best_ = state.fit;
    return upper.fit.energy < state.fit.energy && state.fit.energy < lower.fit.energy;
  }

  TORCHQAT_HD StepState evaluate(double step, int depth) {
    StepState state;
    int own = 0;
    for (int level = team_.first_level(); level <= top_; level += team_.stride(), ++own) {
      const int64_t from = counts_[0][own];
      const int64_t to = counts_[depth][own];
      int64_t count = from;
      if (from < to) {
        const double edge = level - 0.5;
        count = count_from(from, to, edge * step);
        if (from < count) state.above = std::fmin(state.above, weights_.magnitude(count - 1) / edge);
        if (count < to) state.below = std::fmax(state.below, weights_.magnitude(count) / edge);
      }
      counts_[depth + 1][own] = count;
      state.fit = state.fit + WeightFit{(2.0 * level - 1) * count, weights_.sum_of_first(count)};
    }
    return team_.join(state);
  }

  const Weights& weights_;
  int top_;
  Team& team_;
  WeightFit best_;
  StepState states_[kDepth];
  int64_t counts_[kDepth][Team::kOwnLevels];
};

}  // namespace torchqat::math
