#pragma once

#include <c10/util/Exception.h>

#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "torchqat/math/staircase_backward.h"
#include "torchqat/math/ste.h"

// From the names in the schema to the types in math/ste.h.
namespace torchqat {

// The names of a list of types, for error messages.
template <typename List>
std::string names_of() {
  std::string names;
  std::apply([&](auto... member) { ((names += names.empty() ? "" : ", ", names += member.name), ...); },
             List{});
  return names;
}

// Calls f(Ste{}) for the STE named `ste`.
template <typename F>
void with_ste(std::string_view ste, F&& f) {
  const bool known = math::visit_named<math::SteCatalogue>(ste, std::forward<F>(f));
  TORCH_CHECK_VALUE(known, "staircase_relu: unknown ste '", ste, "'; choose one of ",
                    names_of<math::SteCatalogue>());
}

// The place of the STE in math::SteCatalogue.
inline size_t ste_index(std::string_view ste) {
  size_t index = 0;
  with_ste(ste, [&]<typename Ste>(Ste) {
    std::apply([&](auto... member) { ((std::is_same_v<decltype(member), Ste> || (++index, false)) || ...); },
               math::SteCatalogue{});
  });
  return index;
}

// Calls f(Rule{}) for the rule named `alpha_grad`.
template <typename F>
void with_alpha_grad(std::string_view alpha_grad, F&& f) {
  const bool known = math::visit_named<math::AlphaGradRules>(alpha_grad, std::forward<F>(f));
  TORCH_CHECK_VALUE(known, "staircase_relu: unknown alpha_grad '", alpha_grad, "'; choose one of ",
                    names_of<math::AlphaGradRules>());
}

// What backward reads: x where the slope of the STE is a function of it; else the level where the derivative
// in alpha is (at one bit that is a function of the region too); else the region alone.
enum class Needs { region, level, x };

inline Needs backward_needs(std::string_view ste, std::string_view alpha_grad, int64_t bits) {
  Needs needs = Needs::region;
  with_alpha_grad(alpha_grad, [&]<typename Rule>(Rule) {
    if (Rule::exact && bits > 1) needs = Needs::level;
  });
  with_ste(ste, [&]<typename Ste>(Ste) {
    if (!math::RegionSte<Ste>) needs = Needs::x;
  });
  return needs;
}

// The derivative in alpha as a function of the region; `exact` replaces `inside` by the level itself.
inline math::AlphaSlope alpha_slope(std::string_view alpha_grad, int64_t bits) {
  math::AlphaSlope slope;
  with_alpha_grad(alpha_grad, [&]<typename Rule>(Rule) {
    const int top = math::staircase_top(bits);
    slope = {Rule::exact, static_cast<float>(Rule::inside(top)), static_cast<float>(top)};
  });
  return slope;
}

}  // namespace torchqat
