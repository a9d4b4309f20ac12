// Compiled once for each instruction set, see simd.h.
#include "torchqat/cpu/bcgd_kernels.h"

#include <algorithm>

#include "torchqat/cpu/bcgd_sums.h"

namespace torchqat::TORCHQAT_ISA {
namespace {

// Calls f(y) for all groups of a run.
template <typename T, typename F>
void for_each_group(const T* y, int64_t count, F&& f) {
  int64_t i = 0;
  for (; i + kGroup <= count; i += kGroup) f(y + i);
  if (i < count) f(Padded<T>(y + i, count - i));
}

// Loads, and asks for what comes later: the processor by itself does not look far enough ahead in several
// arrays at once.
template <typename T>
auto load_ahead(const T* from) {
  constexpr uintptr_t kBytesAhead = 2048;
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + kBytesAhead));
  return load(from);
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
  const math::StepRule<Vec<T>> wide{rule.lr,    rule.momentum, rule.undamped, rule.weight_decay,   rule.keep,
                                    rule.blend, rule.divisor,  rule.nesterov, rule.divisor != T(1)};
  const auto step = [&](const S* w, const S* g, T* y, T* buffer) {
    const Vec<T> before = load_ahead(y);
    Vec<T> after;
    if (buffer) {
      Vec<T> b = load_ahead(buffer);
      after = wide(before, w_of(w, before), load_ahead(g), b, first);
      store(buffer, b);
    } else {
      after = wide(before, w_of(w, before), load_ahead(g));
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
      run, rule, first, [](const S* w, Vec<T>) { return load_ahead(w); }, own);
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
        run, rule, first, [](const S* w, Vec<T>) { return load_ahead(w); }, own);
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

template <typename S, typename T>
TORCHQAT_ALL_INLINE void update_ternary(const BcgdRun<S, T>& run, const math::StepRule<T>& rule, bool first,
                                        const math::TernaryEdges<T>& edges, math::TernarySums& sums,
                                        T** near) {
  EdgeSums<T> own(edges, *near);
  step_run(
      run, rule, first, [](const S* w, Vec<T>) { return load_ahead(w); }, own);
  own.add_to(sums, run.count);
  *near = own.near();
}

template <typename T>
TORCHQAT_ALL_INLINE void gather(const T* y, int64_t count, const math::MagnitudeWindow<T>& window,
                                math::WeightFit& above, T** kept) {
  LaneCounts<T> number;
  LaneSums sum;
  T* end = *kept;
  for_each_group(y, count, [&](const T* group) {
    for (int lane = 0; lane < kGroup; lane += Vec<T>::size) {
      const Vec<T> m = magnitude(load_ahead(group + lane));
      const Mask<T> is_above = m > Vec<T>(window.high);
      const Mask<T> is_below = m <= Vec<T>(window.low);
      number.add(is_above);
      sum.add(lane, where(is_above, m, Vec<T>(T(0))));
      end = compress(end, (!is_below) & !is_above, m);
    }
  });
  above = above + math::WeightFit{number.total(), sum.total()};
  *kept = end;
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
TORCHQAT_ALL_INLINE void write(S* w, const T* y, int64_t count, T scale, const Levels<T>& levels,
                               bool past_caches) {
  with_levels(levels, [&](const auto& level) {
    const auto write_group = [&](S* to, const T* from, auto&& put) {
      for (int lane = 0; lane < kGroup; lane += Vec<T>::size) {
        const Vec<T> v = load_ahead(from + lane);
        put(to + lane, Vec<T>(scale) * math::with_sign_of(v, level(magnitude(v))));
      }
    };
    const auto put = [](S* to, Vec<T> v) { store(to, v); };
    int64_t i = 0;
    if (past_caches && is_aligned(w)) {
      const auto put_past = [](S* to, Vec<T> v) { stream(to, v); };
      for (; i + kGroup <= count; i += kGroup) write_group(w + i, y + i, put_past);
    }
    for (; i + kGroup <= count; i += kGroup) write_group(w + i, y + i, put);
    if (i == count) return;
    S left[kGroup];
    write_group(left, Padded<T>(y + i, count - i), put);
    std::copy_n(left, count - i, w + i);
  });
}

}  // namespace

template <typename S, typename T>
const BcgdKernels<S, T>& bcgd_kernels() {
  static constexpr BcgdKernels<S, T> kernels{update<S, T>,         update_binary<S, T>, update_warm<S, T>,
                                             update_ternary<S, T>, gather<T>,           fit<T>,
                                             write<S, T>};
  return kernels;
}

template const BcgdKernels<float, float>& bcgd_kernels();
template const BcgdKernels<double, double>& bcgd_kernels();
template const BcgdKernels<c10::Half, float>& bcgd_kernels();
template const BcgdKernels<c10::BFloat16, float>& bcgd_kernels();

}  // namespace torchqat::TORCHQAT_ISA
