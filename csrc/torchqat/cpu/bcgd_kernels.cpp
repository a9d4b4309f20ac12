// Compiled once for each instruction set, see simd.h.
#include "torchqat/cpu/bcgd_kernels.h"

#include <algorithm>
#include <limits>

#include "torchqat/cpu/simd_memory.h"
#include "torchqat/cpu/simd_sums.h"

namespace torchqat::TORCHQAT_ISA {
namespace {

// Sums over one assignment that needs no look at y, all magnitudes at the top level, and the largest of them.
template <typename T>
class TopSums {
 public:
  void add(int lane, Vec<T> magnitude) {
    sum_.add(lane, magnitude);
    peak_ = where(magnitude > peak_, magnitude, peak_);
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
    peak_ = where(magnitude > peak_, magnitude, peak_);
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

// Calls f(y) for all groups of a run.
template <typename T, typename F>
void for_each_group(const T* y, int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) f(y + i);
  if (i < count) f(Padded<T>(y + i, count - i));
}

// Calls step(w, g, y, buffer), which returns the new y of a vector, for all of the run; sums.add() sees the
// magnitudes. What is left over at the end is padded by zeros, which add nothing.
template <typename S, typename T, typename Step, typename Sums>
void for_each_vector(const BcgdRun<S, T>& run, Step&& step, Sums& sums) {
  constexpr int size = Vec<T>::size;
  int64_t i = 0;
  for (; i + kGroup <= run.count; i += kGroup) {
    for (int lane = 0; lane < kGroup; lane += size) {
      const int64_t p = i + lane;
      sums.add(lane, magnitude(step(run.w + p, run.g + p, run.y + p, run.buffer ? run.buffer + p : nullptr)));
    }
    sums.end_group();
  }
  const int64_t left = run.count - i;
  if (left == 0) return;
  const Padded<S> w(run.w + i, left);
  const Padded<S> g(run.g + i, left);
  Padded<T> y(run.y + i, left);
  Padded<T> buffer(run.buffer ? run.buffer + i : run.y + i, left);
  for (int lane = 0; lane < kGroup; lane += size) {
    step(w.values + lane, g.values + lane, y.values + lane, run.buffer ? buffer.values + lane : nullptr);
  }
  std::copy_n(y.values, left, run.y + i);
  if (run.buffer) std::copy_n(buffer.values, left, run.buffer + i);
  const Padded<T> made(y, left);
  for (int lane = 0; lane < kGroup; lane += size) sums.add(lane, magnitude(load(made.values + lane)));
}

// One step; w_of(w, y) is the vector of quantized weights.
template <typename S, typename T, typename WOf, typename Sums>
void step_run(const BcgdRun<S, T>& run, const math::StepRule<T>& rule, bool first, WOf&& w_of, Sums& sums) {
  const math::StepRule<Vec<T>> wide{rule.lr,   rule.momentum, rule.undamped, rule.weight_decay,
                                    rule.keep, rule.blend,    rule.divisor,  rule.nesterov};
  const auto step = [&](const S* w, const S* g, T* y, T* buffer) {
    const Vec<T> before = load(y);
    Vec<T> after;
    if (buffer) {
      Vec<T> b = load(buffer);
      after = wide(before, w_of(w, before), load(g), b, first);
      store(buffer, b);
    } else {
      after = wide(before, w_of(w, before), load(g));
    }
    store(y, after);
    return after;
  };
  for_each_vector(run, step, sums);
}

template <typename S, typename T>
TORCHQAT_ALL_INLINE void update(const BcgdRun<S, T>& run, const math::StepRule<T>& rule, bool first,
                                math::StepSums<1>& sums) {
  TopSums<T> own;
  step_run(
      run, rule, first, [](const S* w, Vec<T>) { return load(w); }, own);
  own.add_to(sums, run.count);
}

template <typename S, typename T>
TORCHQAT_ALL_INLINE void update_binary(const BcgdRun<S, T>& run, const math::StepRule<T>& rule, bool first,
                                       T scale, math::StepSums<1>& sums) {
  TopSums<T> own;
  const Vec<T> stored = static_cast<T>(static_cast<S>(scale));
  step_run(
      run, rule, first, [=](const S*, Vec<T> y) { return math::with_sign_of(y, stored); }, own);
  own.add_to(sums, run.count);
}

template <typename S, typename T>
TORCHQAT_ALL_INLINE void update_warm(const BcgdRun<S, T>& run, const math::StepRule<T>& rule, bool first,
                                     const math::WarmLevel<T> (&levels)[math::kWarmSteps], bool few,
                                     math::StepSums<math::kWarmSteps>& sums) {
  const auto step_with = [&](auto& own) {
    step_run(
        run, rule, first, [](const S* w, Vec<T>) { return load(w); }, own);
  };
  WarmSums<T, true> exact(levels);
  if (few) {
    step_with(exact);
  } else {
    WarmSums<T, false> own(levels);
    step_with(own);
    if (own.in_range()) return own.add_to(sums, run.count);
    for_each_group(run.y, run.count, [&](const T* y) {
      for (int lane = 0; lane < kGroup; lane += Vec<T>::size) exact.add(lane, magnitude(load(y + lane)));
    });
  }
  exact.add_to(sums, run.count);
}

// Calls f(rule), where rule(magnitude) is the level.
template <typename T, typename F>
void with_levels(const Levels<T>& levels, F&& f) {
  if (levels.rule == LevelRule::top) {
    f(math::TopLevel<Vec<T>>());
  } else if (levels.rule == LevelRule::kept) {
    f(math::KeptLevel<Vec<T>>{Vec<T>(levels.at)});
  } else {
    f(math::NearestLevel<Vec<T>>(math::NearestLevel<T>(levels.at, levels.bits)));
  }
}

template <typename T>
TORCHQAT_ALL_INLINE void fit(const T* y, int64_t count, const Levels<T>& levels, math::WeightFit& fit) {
  with_levels(levels, [&](const auto& level) {
    LaneSums energy;
    LaneSums overlap;
    for_each_group(y, count, [&](const T* group) {
      for (int lane = 0; lane < kGroup; lane += Vec<T>::size) {
        const Vec<T> m = magnitude(load(group + lane));
        const Vec<T> q = level(m);
        energy.add(lane, q * q);
        overlap.add_products(lane, m, q);
      }
    });
    fit = fit + math::WeightFit{energy.total(), overlap.total()};
  });
}

template <typename S, typename T>
TORCHQAT_ALL_INLINE void write(S* w, const T* y, int64_t count, T scale, const Levels<T>& levels) {
  with_levels(levels, [&](const auto& level) {
    const auto write_group = [&](S* to, const T* from) {
      for (int lane = 0; lane < kGroup; lane += Vec<T>::size) {
        const Vec<T> v = load(from + lane);
        store(to + lane, Vec<T>(scale) * math::with_sign_of(v, level(magnitude(v))));
      }
    };
    int64_t i = 0;
    for (; i + kGroup <= count; i += kGroup) write_group(w + i, y + i);
    if (i == count) return;
    S left[kGroup];
    write_group(left, Padded<T>(y + i, count - i));
    std::copy_n(left, count - i, w + i);
  });
}

}  // namespace

template <typename S, typename T>
const BcgdKernels<S, T>& bcgd_kernels() {
  static constexpr BcgdKernels<S, T> kernels{update<S, T>, update_binary<S, T>, update_warm<S, T>, fit<T>,
                                             write<S, T>};
  return kernels;
}

template const BcgdKernels<float, float>& bcgd_kernels();
template const BcgdKernels<double, double>& bcgd_kernels();
template const BcgdKernels<c10::Half, float>& bcgd_kernels();
template const BcgdKernels<c10::BFloat16, float>& bcgd_kernels();

}  // namespace torchqat::TORCHQAT_ISA
