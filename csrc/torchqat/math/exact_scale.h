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

// Ends of intervals that a search keeps at a time. When there are more it forgets one, and finds it again.
constexpr int kSearchDepth = 24;

// Weights: size(), and of the magnitudes in descending order magnitude(i) and sum_of_first(count).
// Team: the threads that search together, each for the levels first_level(), first_level() + stride(), .. of
// its own. join() adds up what they found, in a fixed order, and gives the sum to all. The team keeps, for
// kDepth ends of intervals, a state, state(slot) and set_state(slot, state), and count(slot, own) for each
// own level.
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
    best_ = {top * top * static_cast<double>(n), top * weights_.sum_of_first(n)};
    enter(1, {best_, weights_.magnitude(n - 1) / (top - 0.5), 0}, n);
    for (depth_ = 1; depth_ > 0;) {
      if (!split()) {
        copy(depth_, 0);
        --depth_;
      }
    }
    return best_;
  }

 private:
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

  // Slot 0 is the upper end of the interval in hand; slots 1 to depth_ are a stack of lower ends, its own on
  // top.
  TORCHQAT_HD void enter(int slot, const StepState& state, int64_t count) {
    team_.set_state(slot, state);
    for_own_levels([&](int own, int) { team_.count(slot, own) = count; });
  }
  TORCHQAT_HD void copy(int from, int to) {
    team_.set_state(to, StepState(team_.state(from)));
    for_own_levels([&](int own, int) { team_.count(to, own) = team_.count(from, own); });
  }

  // Puts an end between upper and lower on the stack. False when no step size between them can be the best.
  TORCHQAT_HD bool split() {
    const StepState upper = team_.state(0);
    const StepState lower = team_.state(depth_);
    const double high = upper.below;
    const double low = lower.above;
    if (!(low < high)) return false;
    // A step of 2j - 1 in energy adds the magnitude (j - 1/2) t to the overlap.
    const double bound = score_bound(upper.fit, lower.fit, high / 2, low / 2);
    if (!(bound > best_.score() * (1 + kScoreSlack))) return false;
    if (depth_ + 1 == Team::kDepth) forget_one();
    // Geometric halves reach neighboring doubles from any range in a few dozen splits.
    const double middle = low > 0 ? std::fmin(std::sqrt(low) * std::sqrt(high), high) : high / 2;
    const StepState state = evaluate(middle > low ? middle : high);
    if (state.fit.score() > best_.score()) best_ = state.fit;
    if (!(upper.fit.energy < state.fit.energy && state.fit.energy < lower.fit.energy)) return false;
    team_.set_state(++depth_, state);
    return true;
  }

  // Joins the two lowest intervals of the stack into one.
  TORCHQAT_HD void forget_one() {
    for (int slot = 3; slot <= depth_; ++slot) copy(slot, slot - 1);
    --depth_;
  }

  // The state at a step size between upper and lower; its counts go to the slot above the stack.
  TORCHQAT_HD StepState evaluate(double step) {
    StepState state;
    for_own_levels([&](int own, int level) {
      const int64_t from = team_.count(0, own);
      const int64_t to = team_.count(depth_, own);
      int64_t count = from;
      if (from < to) {
        const double edge = level - 0.5;
        count = count_from(from, to, edge * step);
        if (from < count) state.above = std::fmin(state.above, weights_.magnitude(count - 1) / edge);
        if (count < to) state.below = std::fmax(state.below, weights_.magnitude(count) / edge);
      }
      team_.count(depth_ + 1, own) = count;
      const double energy = (2.0 * level - 1) * static_cast<double>(count);
      state.fit = state.fit + WeightFit{energy, weights_.sum_of_first(count)};
    });
    return team_.join(state);
  }

  template <typename F>
  TORCHQAT_HD void for_own_levels(F&& f) {
    int own = 0;
    for (int level = team_.first_level(); level <= top_; level += team_.stride()) f(own++, level);
  }

  const Weights& weights_;
  int top_;
  Team& team_;
  int depth_ = 0;
  WeightFit best_;
};

}  // namespace torchqat::math
