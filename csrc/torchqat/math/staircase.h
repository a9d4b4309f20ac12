#pragma once

#include <cstdint>
#include <limits>

#include "torchqat/math/macros.h"
#include "torchqat/math/select.h"

namespace torchqat::math {

// Highest step index of a b-bit staircase.
TORCHQAT_HD constexpr int staircase_top(int64_t bits) { return (1 << bits) - 1; }

// Where an activation falls. Two bits: all that the backward pass of most STEs needs to keep.
enum class Region : uint8_t { below = 0, inside = 1, above = 2, nan = 3 };

// Its two bits apart. M is bool, or what a comparison of SIMD vectors gives.
template <typename M>
struct RegionBits {
  M low;
  M high;
};

TORCHQAT_HD constexpr RegionBits<bool> bits_of(Region region) {
  const auto code = static_cast<unsigned>(region);
  return {(code & 1u) != 0, (code & 2u) != 0};
}

// The b-bit staircase ReLU of step size alpha (BCGD, Yin et al. 2019): 0 on x <= 0, k * alpha on
// ((k-1) * alpha, k * alpha] for k = 1..top, flat above. T is the op-math type, or a SIMD vector of it.
template <typename T>
struct Staircase {
  T alpha;  // NaN unless the step size given was > 0: everything it governs is then NaN
  T top;    // 2^bits - 1
  T bound;  // top * alpha, where the clipped proxies end. The staircase itself saturates one step earlier.
  T zero;   // 0, or NaN where alpha is

  TORCHQAT_HD Staircase(T step, int64_t bits) : top(T(staircase_top(bits))) {
    const T nan = T(std::numeric_limits<float>::quiet_NaN());
    alpha = where(step > T(0), step, nan);
    zero = where(step > T(0), T(0), nan);
    bound = top * alpha;
  }

  // Step index, 0..top, never -0; NaN at x = NaN. The division is a true one: x * (1 / alpha) would move
  // points that lie on the grid up a step. The lower limit of 1 serves x so small that x / alpha underflows.
  TORCHQAT_HD T level(T x) const {
    const T k = at_least(at_least(x, T(0)) / alpha, where(x > T(0), T(1), T(0)));
    return ceiling(at_most(k, top)) + T(0);
  }

  // The step index as a number that has a step: 0 for NaN.
  TORCHQAT_HD T code(T x) const {
    const T k = level(x);
    return where(k > T(0), k, T(0));
  }

  TORCHQAT_HD T operator()(T x) const { return value(level(x)); }
  // What the staircase gives at step index k: 0 rather than 0 * inf.
  TORCHQAT_HD T value(T k) const { return where(k > T(0), alpha * k, k); }

  // NaN, in x or by alpha, fails all comparisons and sets both bits.
  TORCHQAT_HD auto region_bits(T x) const {
    using M = decltype(x > x);
    const M above_or_nan = !(x <= bound);
    const M inside_or_nan = (!(x <= zero)) & (!(x > bound));
    return RegionBits<M>{inside_or_nan, above_or_nan};
  }
  // The step index and the region in one number: the index, top + 1 above the bound, top + 2 for NaN. With
  // one bit it is the region.
  TORCHQAT_HD T state(T x) const {
    const T k = level(x) + where(x > bound, T(1), T(0));
    return where(k >= T(0), k, top + T(2));
  }
  TORCHQAT_HD T level_of_state(T state) const {
    return where(state > top + T(1), T(std::numeric_limits<float>::quiet_NaN()), at_most(state, top));
  }
  TORCHQAT_HD auto region_bits_of_state(T state) const {
    using M = decltype(state > state);
    const M above_or_nan = state > top;
    const M below_or_above = !((state > T(0)) & !(state == top + T(1)));
    return RegionBits<M>{!below_or_above, above_or_nan};
  }
  TORCHQAT_HD Region region(T x) const {
    const auto bits = region_bits(x);
    return static_cast<Region>(static_cast<unsigned>(bits.low) | static_cast<unsigned>(bits.high) << 1);
  }
};

}  // namespace torchqat::math
