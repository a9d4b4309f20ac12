// Compiled once for each instruction set, see simd.h.
#include "torchqat/cpu/bcgd_kernels.h"

#include <algorithm>

#include "torchqat/cpu/simd_memory.h"
#include "torchqat/cpu/simd_sums.h"

namespace torchqat::TORCHQAT_ISA {
namespace {

// Sums over one assignment that needs no look at y, all magnitudes at the top level, and the largest of them.
template <typename T>
class TopSums {
 public:
  void add(Vec<T> magnitude) {
    sum_.add(0, magnitude);
    peak_ = where(magnitude > peak_, magnitude, peak_);
  }
  void add_to(math::StepSums<1>& sums, int64_t count) const {
    sums.fits[0] = sums.fits[0] + math::WeightFit{static_cast<double>(count), sum_.total()};
    sums.peak = std::max(sums.peak, static_cast<double>(largest(peak_)));
  }

 private:
  LaneSums sum_;
  Vec<T> peak_ = T(0);
};

// Sums over the assignments of the warm start, in A: float64, or T.
template <typename A>
class WarmSums {
 public:
  template <typename T>
  explicit WarmSums(const math::WarmLevel<T> (&levels)[math::kWarmSteps]) {
    for (int i = 0; i < math::kWarmSteps; ++i) levels_[i] = math::WarmLevel<Vec<A>>(levels[i]);
  }
  void add(Vec<A> magnitude) {
    for (int i = 0; i < math::kWarmSteps; ++i) {
      const Vec<A> q = levels_[i](magnitude);
      energy_[i] = energy_[i] + q * q;
      overlap_[i] = overlap_[i] + magnitude * q;
    }
    peak_ = where(magnitude > peak_, magnitude, peak_);
  }
  template <typename T>
  requires(!std::is_same_v<T, A>) void add(Vec<T> magnitude) {
    for (const auto part : widened(magnitude)) add(part);
  }
  void add_to(math::StepSums<math::kWarmSteps>& sums, int64_t) const {
    for (int i = 0; i < math::kWarmSteps; ++i) {
      sums.fits[i] = sums.fits[i] + math::WeightFit{total(energy_[i]), total(overlap_[i])};
    }
    sums.peak = std::max(sums.peak, static_cast<double>(largest(peak_)));
  }

 private:
  math::WarmLevel<Vec<A>> levels_[math::kWarmSteps];
  Vec<A> energy_[math::kWarmSteps] = {};
  Vec<A> overlap_[math::kWarmSteps] = {};
  Vec<A> peak_ = A(0);
};

// Calls step(w, g, y, buffer) for a vector of elements of the run after the other, then for a copy of what is
// left over, padded by zeros; sums.add() sees the new magnitudes, and 0 for the padding.
template <typename S, typename T, typename Step, typename Sums>
void for_each_vector(const BcgdRun<S, T>& run, Step&& step, Sums& sums) {
  constexpr int size = Vec<T>::size;
  int64_t i = 0;
  for (; i + size <= run.count; i += size) {
    sums.add(magnitude(step(run.w + i, run.g + i, run.y + i, run.buffer ? run.buffer + i : nullptr)));
  }
  const int64_t left = run.count - i;
  if (left == 0) return;
  S w[size] = {};
  S g[size] = {};
  T y[size] = {};
  T buffer[size] = {};
  std::copy_n(run.w + i, left, w);
  std::copy_n(run.g + i, left, g);
  std::copy_n(run.y + i, left, y);
  if (run.buffer) std::copy_n(run.buffer + i, left, buffer);
  step(w, g, y, run.buffer ? buffer : nullptr);
  if (run.buffer) std::copy_n(buffer, left, run.buffer + i);
  std::copy_n(y, left, run.y + i);
  std::fill(y + left, y + size, T(0));
  sums.add(magnitude(load(y)));
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
                                     const math::WarmLevel<T> (&levels)[math::kWarmSteps],
                                     math::StepSums<math::kWarmSteps>& sums) {
  const auto with = [&](auto own) {
    step_run(
        run, rule, first, [](const S* w, Vec<T>) { return load(w); }, own);
    own.add_to(sums, run.count);
  };
  // Few weights have assignments that are equally good but for rounding. The roundings of many even out.
  constexpr int64_t kMany = 512;
  run.count < kMany ? with(WarmSums<double>(levels)) : with(WarmSums<T>(levels));
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
    const auto add = [&](Vec<T> m) {
      const Vec<T> q = level(m);
      energy.add(0, q * q);
      overlap.add(0, m * q);
    };
    int64_t i = 0;
    for (; i + Vec<T>::size <= count; i += Vec<T>::size) add(magnitude(load(y + i)));
    T left[Vec<T>::size] = {};
    std::copy_n(y + i, count - i, left);
    if (i < count) add(magnitude(load(left)));
    fit = fit + math::WeightFit{energy.total(), overlap.total()};
  });
}

template <typename S, typename T>
TORCHQAT_ALL_INLINE void write(S* w, const T* y, int64_t count, T scale, const Levels<T>& levels) {
  with_levels(levels, [&](const auto& level) {
    const auto value = [&](Vec<T> v) { return Vec<T>(scale) * math::with_sign_of(v, level(magnitude(v))); };
    int64_t i = 0;
    for (; i + Vec<T>::size <= count; i += Vec<T>::size) store(w + i, value(load(y + i)));
    if (i == count) return;
    T left[Vec<T>::size] = {};
    S out[Vec<T>::size];
    std::copy_n(y + i, count - i, left);
    store(out, value(load(left)));
    std::copy_n(out, count - i, w + i);
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
