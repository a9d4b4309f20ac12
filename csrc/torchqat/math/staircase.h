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
  // that lie on the grid up a step. The quotient is bounded first, so that its ceiling can be taken through
  // an integer: every processor has vectors for that. The lower clamp serves x so small that x / alpha
  // underflows.
  TORCHQAT_HD T level(T x) const {
    T quotient = x / alpha;
    quotient = quotient > T(0) ? quotient : T(0);
    quotient = quotient < top ? quotient : top;
    const T whole = static_cast<T>(static_cast<int>(quotient));
    const T k = whole < quotient ? whole + T(1) : whole;
    return x > T(0) ? (k < T(1) ? T(1) : k) + zero : (x <= T(0) ? zero : x);
  }

  // The step index as an integer. NaN has no step: 0.
  TORCHQAT_HD uint8_t code(T x) const {
    const T k = level(x);
    return static_cast<uint8_t>(static_cast<int>(k > T(0) ? k : T(0)));
  }

  TORCHQAT_HD T operator()(T x) const {
    const T k = level(x);
    return k > T(0) ? alpha * k : k;  // never -0, and 0 rather than 0 * inf
  }

  // Comparisons alone, without a branch: NaN, in x or by alpha, fails them all and sets both bits.
  TORCHQAT_HD Region region(T x) const {
    const unsigned inside_or_nan = static_cast<unsigned>(!(x <= zero)) & static_cast<unsigned>(!(x > bound));
    const unsigned above_or_nan = static_cast<unsigned>(!(x <= bound));
    return static_cast<Region>(inside_or_nan | above_or_nan << 1);
  }
};

}  // namespace torchqat::math
