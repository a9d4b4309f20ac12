#pragma once

#include <string_view>
#include <tuple>

#include "torchqat/math/macros.h"
#include "torchqat/math/staircase.h"

// Straight-through estimators: what the backward pass uses in place of the staircase's zero slope,
// and the rules for the derivative in alpha. A new one is a struct here and its name in the list.
namespace torchqat::math {

// An STE is the slope of a proxy function. Where that slope is 0 or 1 it is stated per region
// (`passes`), and a 2-bit region code is all that the backward pass keeps; else as `slope(x)`, and x is kept.
// Slopes are never asked for at Region::nan: there the gradient is NaN.

// y = x (Bengio et al. 2013). The theory's warning example: it does not vanish on x <= 0.
struct Identity {
  static constexpr std::string_view name = "identity";
  static TORCHQAT_HD constexpr bool passes(Region) { return true; }
};

// y = max(x, 0) (Yin et al. 2019, "Understanding straight-through estimator").
struct Relu {
  static constexpr std::string_view name = "relu";
  static TORCHQAT_HD constexpr bool passes(Region r) { return r != Region::below; }
};

// y = min(max(x, 0), top * alpha) (Cai et al. 2017; Yin et al. 2019).
struct ClippedRelu {
  static constexpr std::string_view name = "clipped_relu";
  static TORCHQAT_HD constexpr bool passes(Region r) { return r == Region::inside; }
};

// y = x up to the bound q = top * alpha, q + log(x - q + 1) above (HWGQ, Cai et al. 2017).
struct LogTailedRelu {
  static constexpr std::string_view name = "log_tailed_relu";
  template <typename T>
  static TORCHQAT_HD T slope(T x, const Staircase<T>& s) {
    return where(x <= T(0), T(0), where(x <= s.bound, T(1), T(1) / (x - s.bound + T(1))));
  }
};

// y = q (1 - exp(-x / q)) on x > 0, q = top * alpha (Long, Yin, Xin 2021).
struct ReverseExponential {
  static constexpr std::string_view name = "reverse_exponential";
  template <typename T>
  static TORCHQAT_HD T slope(T x, const Staircase<T>& s) {
    return where(x <= T(0), T(0), exponential(-x / s.bound));
  }
};

using SteCatalogue = std::tuple<Identity, Relu, ClippedRelu, LogTailedRelu, ReverseExponential>;

// True for an STE whose slope is a function of the region alone.
template <typename Ste>
concept RegionSte = requires {
  Ste::passes(Region::inside);
};

// The derivative of the staircase in alpha, by region: 0 below, `inside`, and top above (BCGD, section 2).
// `exact` is the level itself inside; a RegionSte with any other rule needs no more than the region.
struct ThreeValued {
  static constexpr std::string_view name = "three_valued";
  static constexpr bool exact = false;
  static constexpr int inside(int top) { return (top + 1) / 2; }
};
struct Exact {
  static constexpr std::string_view name = "exact";
  static constexpr bool exact = true;
  static constexpr int inside(int) { return 1; }  // at one bit, where the level inside is 1 and top is 1
};
struct Min {
  static constexpr std::string_view name = "min";
  static constexpr bool exact = false;
  static constexpr int inside(int) { return 1; }
};
struct Pact {
  static constexpr std::string_view name = "pact";
  static constexpr bool exact = false;
  static constexpr int inside(int) { return 0; }
};

using AlphaGradRules = std::tuple<Exact, ThreeValued, Min, Pact>;

// Calls f(member) for the member of a list (a std::tuple of types) with that name; false when there is none.
template <typename List, typename F>
bool visit_named(std::string_view name, F&& f) {
  return std::apply([&](auto... member) { return ((member.name == name && (f(member), true)) || ...); },
                    List{});
}

}  // namespace torchqat::math
