#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "torchqat/cpu/simd_sums.h"
#include "torchqat/math/bcgd.h"
#include "torchqat/math/ternary_near.h"

// What the passes of a BCGD step add up, vector by vector, while they make the new y of a run.
namespace torchqat::TORCHQAT_ISA {

// Sums over one assignment that needs no look at y, all magnitudes at the top level, and the largest of them.
template <typename T>
class TopSums {
 public:
  void add(int lane, Vec<T> magnitude) {
    sum_.add(lane, magnitude);
    peak_ = at_least(peak_, magnitude);
  }
  void end_group() {}
  void add_to(math::StepSums<1>& sums, int64_t count) const {
    sums.fits[0] = sums.fits[0] + math::WeightFit{static_cast<double>(count), sum_.total()};
    sums.peak = std::max(sums.peak, static_cast<double>(largest(peak_)));
  }

 private:
  LaneSums sum_;
  Vec<T> peak_ = T(0);
};

// Sums over the assignments of the warm start. Squares of levels are below 2^14: float32 adds up those of a
// run, 2^11 at most, of which a lane has a fourth or less, without rounding. Products with magnitudes add up
// in float64: all of them where `exact`, else sums of a few in T.
template <typename T, bool exact>
class WarmSums {
 public:
  explicit WarmSums(const math::WarmLevel<T> (&levels)[math::kWarmSteps]) {
    for (int i = 0; i < math::kWarmSteps; ++i) levels_[i] = math::WarmLevel<Vec<T>>(levels[i]);
  }
  void add(int lane, Vec<T> magnitude) {
    [[maybe_unused]] const int part = lane / Vec<T>::size;
    for (int i = 0; i < math::kWarmSteps; ++i) {
      const Vec<T> q = levels_[i](magnitude);
      energy_[i] = energy_[i] + q * q;
      if constexpr (exact) {
        overlap_[i].add_products(lane, magnitude, q);
      } else {
        recent_[i][part] = recent_[i][part] + magnitude * q;
      }
    }
    peak_ = at_least(peak_, magnitude);
  }
  void end_group() {
    if (!exact && ++groups_ % kFewGroups == 0) gather();
  }
  // Whether sums of a few products are far from overflow.
  bool in_range() const {
    return largest(peak_) < std::numeric_limits<T>::max() / (math::weight_top(8) * (kFewGroups + 1));
  }
  void add_to(math::StepSums<math::kWarmSteps>& sums, int64_t) {
    gather();
    for (int i = 0; i < math::kWarmSteps; ++i) {
      sums.fits[i] = sums.fits[i] + math::WeightFit{total(energy_[i]), overlap_[i].total()};
    }
    sums.peak = std::max(sums.peak, static_cast<double>(largest(peak_)));
  }

 private:
  static constexpr int kFewGroups = 8;

  void gather() {
    for (int i = 0; i < math::kWarmSteps; ++i) {
      for (int lane = 0; lane < kGroup; lane += Vec<T>::size) {
        overlap_[i].add(lane, recent_[i][lane / Vec<T>::size]);
        recent_[i][lane / Vec<T>::size] = T(0);
      }
    }
  }

  math::WarmLevel<Vec<T>> levels_[math::kWarmSteps];
  Vec<T> energy_[math::kWarmSteps] = {};
  Vec<T> recent_[math::kWarmSteps][kGroup / Vec<T>::size] = {};
  LaneSums overlap_[math::kWarmSteps];
  Vec<T> peak_ = T(0);
  int groups_ = 0;
};

// Sums for the ternary search. A lane of T adds up those of a run, 2^7 at most.
template <typename T>
class EdgeSums {
 public:
  EdgeSums(const math::TernaryEdges<T>& edges, T* near) : near_(near) {
    for (int i = 0; i < math::kTernaryEdges; ++i) edges_[i] = edges.at[i];
  }
  void add(int lane, Vec<T> magnitude) {
    const int part = lane / Vec<T>::size;
#pragma GCC unroll 16
    for (int i = 0; i < math::kTernaryEdges; ++i) {
      const Mask<T> is_above = magnitude > edges_[i];
      count_[i].add(is_above);
      if (i == math::kNear) {
        at_near_.add(lane, where(is_above, magnitude, Vec<T>(T(0))));
        near_ = compress(near_, (magnitude > edges_[i + 1]) & !is_above, magnitude);
      } else {
        above_[i][part] = where(is_above, above_[i][part] + magnitude, above_[i][part]);
      }
    }
    above_[kAll][part] = above_[kAll][part] + magnitude;
    peak_ = at_least(peak_, magnitude);
  }
  void end_group() {}
  void add_to(math::TernarySums& sums, int64_t count) const {
    for (int i = 0; i <= math::kTernaryEdges; ++i) {
      const double above = i == kAll ? static_cast<double>(count) : count_[i].total();
      const LaneSums sum = i == math::kNear ? at_near_ : sum_of_run(i);
      sums.above[i] = sums.above[i] + math::WeightFit{above, sum.total()};
    }
    sums.peak = std::max(sums.peak, static_cast<double>(largest(peak_)));
  }
  T* near() const { return near_; }

 private:
  static constexpr int kAll = math::kTernaryEdges;

  LaneSums sum_of_run(int i) const {
    LaneSums sum;
    for (int lane = 0; lane < kGroup; lane += Vec<T>::size) sum.add(lane, above_[i][lane / Vec<T>::size]);
    return sum;
  }

  Vec<T> edges_[math::kTernaryEdges];
  LaneCounts<T> count_[math::kTernaryEdges];
  Vec<T> above_[math::kTernaryEdges + 1][kGroup / Vec<T>::size] = {};
  LaneSums at_near_;
  Vec<T> peak_ = T(0);
  T* near_;
};

}  // namespace torchqat::TORCHQAT_ISA
