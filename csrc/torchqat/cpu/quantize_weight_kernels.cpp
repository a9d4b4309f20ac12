// Compiled once for each instruction set, see simd.h.
#include "torchqat/cpu/quantize_weight_kernels.h"

#include <algorithm>
#include <cmath>

#include "torchqat/cpu/simd_sums.h"

namespace torchqat::TORCHQAT_ISA {
namespace {

// Calls f(i, count) for groups of n weights and for what is left over at the end, which is less than a group.
template <typename F, typename Rest>
void for_each_group(int64_t n, F&& f, Rest&& rest) {
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) f(i);
  for (; i < n; ++i) rest(i);
}

// The level of a weight, or of each lane of a vector, by a rule for its magnitude.
template <typename T, template <typename> class Rule>
struct SignedLevel {
  Rule<T> rule;
  Rule<Vec<T>> wide;

  T operator()(T w) const { return math::with_sign_of(w, rule(std::abs(w))); }
  Vec<T> operator()(Vec<T> w) const { return math::with_sign_of(w, wide(magnitude(w))); }
};

// Calls f(level) with the SignedLevel of a rule.
template <typename T, typename F>
void with_level(const LevelRule<T>& rule, F&& f) {
  if (rule.method == math::WeightMethod::twn) {
    f(SignedLevel<T, math::KeptLevel>{{rule.cut}, {rule.cut}});
  } else if (rule.bits == 1) {
    f(SignedLevel<T, math::TopLevel>{});
  } else {
    const math::NearestLevel<T> nearest(rule.cut, rule.bits);
    f(SignedLevel<T, math::NearestLevel>{nearest, math::NearestLevel<Vec<T>>(nearest)});
  }
}

template <typename S, typename T>
TORCHQAT_ALL_INLINE void add_magnitudes(const S* w, int64_t n, math::MagnitudeSums& sums) {
  LaneSums sum;
  Vec<T> peak = T(0);
  const auto add_group = [&](int64_t i) {
    for (int lane = 0; lane < kGroup; lane += Vec<T>::size) {
      const Vec<T> m = magnitude(load(w + i + lane));
      sum.add(lane, m);
      peak = at_least(peak, m);
    }
  };
  for_each_group(n, add_group, [&](int64_t i) { sums.add(static_cast<T>(w[i])); });
  sums = sums + math::MagnitudeSums{sum.total(), static_cast<double>(largest(peak))};
}

template <typename S, typename T>
TORCHQAT_ALL_INLINE void add_levels(const S* w, int64_t n, const LevelRule<T>& rule, math::WeightFit& fit) {
  with_level(rule, [&](const auto& level) {
    LaneSums energy;
    LaneSums overlap;
    const auto add_group = [&](int64_t i) {
      for (int lane = 0; lane < kGroup; lane += Vec<T>::size) {
        const Vec<T> v = load(w + i + lane);
        const Vec<T> q = level(v);
        energy.add_products(lane, q, q);
        overlap.add_products(lane, v, q);
      }
    };
    for_each_group(n, add_group, [&](int64_t i) {
      const T v = static_cast<T>(w[i]);
      fit.add(v, level(v));
    });
    fit = fit + math::WeightFit{energy.total(), overlap.total()};
  });
}

template <typename S, typename T>
TORCHQAT_ALL_INLINE void quantize(const S* w, S* quantized, int64_t n, const LevelRule<T>& rule, T scale) {
  with_level(rule, [&](const auto& level) {
    const Vec<T> wide = scale;
    const auto write_group = [&](int64_t i) {
      for (int lane = 0; lane < kGroup; lane += Vec<T>::size) {
        store(quantized + i + lane, wide * level(load(w + i + lane)));
      }
    };
    for_each_group(n, write_group,
                   [&](int64_t i) { quantized[i] = static_cast<S>(scale * level(static_cast<T>(w[i]))); });
  });
}

template <typename S, typename T>
TORCHQAT_ALL_INLINE void codes(const S* w, int8_t* levels, int64_t n, const LevelRule<T>& rule) {
  with_level(rule, [&](const auto& level) {
    const Vec<T> offset = T(128);  // levels as unsigned bytes, whose upper bit turns them back
    const auto write_group = [&](int64_t i) {
      uint8_t bytes[kGroup];
      for (int lane = 0; lane < kGroup; lane += Vec<T>::size) {
        store(bytes + lane, level(load(w + i + lane)) + offset);
      }
      for (int lane = 0; lane < kGroup; ++lane) levels[i + lane] = static_cast<int8_t>(bytes[lane] ^ 128U);
    };
    for_each_group(n, write_group,
                   [&](int64_t i) { levels[i] = static_cast<int8_t>(level(static_cast<T>(w[i]))); });
  });
}

}  // namespace

template <typename S, typename T>
const QuantizeWeightKernels<S, T>& quantize_weight_kernels() {
  static constexpr QuantizeWeightKernels<S, T> kernels{add_magnitudes<S, T>, add_levels<S, T>, quantize<S, T>,
                                                       codes<S, T>};
  return kernels;
}

template const QuantizeWeightKernels<float, float>& quantize_weight_kernels();
template const QuantizeWeightKernels<double, double>& quantize_weight_kernels();
template const QuantizeWeightKernels<c10::Half, float>& quantize_weight_kernels();
template const QuantizeWeightKernels<c10::BFloat16, float>& quantize_weight_kernels();

}  // namespace torchqat::TORCHQAT_ISA
