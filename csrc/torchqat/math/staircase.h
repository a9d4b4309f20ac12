#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "torchqat/math/macros.h"

namespace torchqat::math {

// Where an activation falls. Two bits: all that the backward pass of most STEs needs to keep.
enum class Region : uint8_t { below = 0, inside = 1, above = 2, nan = 3 };

// Highest step index of a b-bit staircase.
TORCHQAT_HD constexpr int staircase_top(int64_t bits) { return (1 << bits) - 1; }

// The b-bit staircase ReLU of step size alpha (BCGD, Yin et al. 2019): 0 on x <= 0, k * alpha on
// ((k-1) * alpha, k * alpha] for k = 1..top, flat above. T is the op-math type.
template <typename T>
struct Staircase {
  T alpha;  // NaN unless the step size given was > 0: everything it governs is then NaN
  T top;    // 2^bits - 1
  T bound;  // top * alpha, where the clipped proxies end. The staircase itself saturates one step earlier.
  T zero;   // 0, or NaN where alpha is

  TORCHQAT_HD Staircase(T step, int64_t bits) : top(T(staircase_top(bits))) {
    const bool valid = step > T(0);
    alpha = valid ? step : std::numeric_limits<T>::quiet_NaN();
    zero = valid ? T(0) : alpha;
    bound = top * alpha;
  }

  // Step index, 0..top; NaN at x = NaN. The division is a true one: x * (1 / alpha) would move points
  // that lie on the grid up a step. The lower clamp serves x so small that x / alpha underflows.
  TORCHQAT_HD T level(T x) const {
    const T k = std::ceil(x / alpha);
    const T step = k < T(1) ? T(1) : (k > top ? top : k);
    return x > T(0) ? step : (x <= T(0) ? zero : x);
  }

  // The step index as an integer. NaN has no step: 0.
  TORCHQAT_HD uint8_t code(T x) const {
    const T k = level(x);
    return k > T(0) ? static_cast<uint8_t>(k) : uint8_t{0};
  }

  TORCHQAT_HD T operator()(T x) const {
    const T k = level(x);
    return k > T(0) ? alpha * k : k;  // never -0, and 0 rather than 0 * inf
  }

  TORCHQAT_HD Region region(T x) const {
    if (x <= zero) return Region::below;
    if (x <= bound) return Region::inside;
    return x > bound ? Region::above : Region::nan;
  }
};

}  // namespace torchqat::math
