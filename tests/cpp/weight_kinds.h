#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <random>
#include <utility>
#include <vector>

#include "torchqat/math/weight_levels.h"

// Weights that are easy and hard to find a scale for, and the best that can be found, by trying every
// breakpoint one after the other.
namespace torchqat::math {

// A distribution of weights: its name, and its i-th of n draws.
struct Kind {
  const char* name;
  std::function<double(std::mt19937_64&, int64_t, int64_t)> draw;
};

inline double normal(std::mt19937_64& random) { return std::normal_distribution<double>()(random); }
inline double uniform(std::mt19937_64& random) { return std::uniform_real_distribution<double>()(random); }

inline const std::vector<Kind>& kinds() {
  static const std::vector<Kind> all = {
      {"normal", [](auto& r, int64_t, int64_t) { return 0.05 * normal(r); }},
      {"uniform", [](auto& r, int64_t, int64_t) { return uniform(r); }},
      {"exponential", [](auto& r, int64_t, int64_t) { return -std::log(uniform(r) + 1e-12); }},
      {"cauchy", [](auto& r, int64_t, int64_t) { return normal(r) / (normal(r) + 1e-12); }},
      {"log-normal", [](auto& r, int64_t, int64_t) { return std::exp(3 * normal(r)); }},
      {"S_k / sqrt(k) is flat",
       [](auto&, int64_t i, int64_t) { return std::sqrt(double(i + 1)) - std::sqrt(double(i)); }},
      {"all equal", [](auto&, int64_t, int64_t) { return 0.1; }},
      {"two values", [](auto&, int64_t i, int64_t) { return i % 7 == 0 ? 1.0 : 1e-3; }},
      {"neighbors", [](auto& r, int64_t, int64_t) { return 0.1 + 1e-8 * static_cast<double>(r() % 5); }},
      {"two clusters",
       [](auto& r, int64_t, int64_t) { return (r() % 2 ? 1.0 : 0.3) * (1 + 1e-6 * normal(r)); }},
      {"on a grid", [](auto& r, int64_t, int64_t) { return 0.013 * static_cast<double>(r() % 8); }},
      {"one huge", [](auto& r, int64_t i, int64_t) { return i == 3 ? 1e30 : 1e-3 * normal(r); }},
      {"one tiny", [](auto& r, int64_t i, int64_t) { return i == 3 ? 1e-30 : normal(r); }},
      {"float denormals", [](auto& r, int64_t, int64_t) { return 1e-42 * normal(r); }},
      {"mostly zero", [](auto& r, int64_t, int64_t) { return r() % 10 == 0 ? normal(r) : 0.0; }},
      {"huge", [](auto& r, int64_t, int64_t) { return 3e38 * uniform(r); }},
      {"all zero", [](auto&, int64_t, int64_t) { return 0.0; }},
  };
  return all;
}

template <typename T>
std::vector<T> weights(const Kind& kind, int64_t n) {
  std::mt19937_64 random(static_cast<unsigned>(n));
  std::vector<T> w(n);
  for (int64_t i = 0; i < n; ++i) w[i] = static_cast<T>(kind.draw(random, i, n));
  return w;
}

// The best score, overlap / sqrt(energy), of all assignments that a step size can make; in long double.
template <typename T>
long double best_score(const std::vector<T>& w, int top) {
  std::vector<std::pair<long double, std::pair<int, long double>>> moves;
  for (const T value : w) {
    const long double m = std::abs(static_cast<long double>(value));
    for (int j = 1; j <= top && m > 0; ++j) moves.push_back({m / (j - 0.5L), {2 * j - 1, m}});
  }
  std::sort(moves.rbegin(), moves.rend());
  long double energy = 0, overlap = 0, best = 0;
  for (const auto& [breakpoint, move] : moves) {
    energy += move.first, overlap += move.second;
    best = std::max(best, overlap / std::sqrt(energy));
  }
  return best;
}

// The score of the levels that a scale assigns.
template <typename T>
long double score_of(const std::vector<T>& w, double scale, int64_t bits) {
  if (scale == 0) return 0;
  long double energy = 0, overlap = 0;
  for (const T value : w) {
    const long double level = weight_level(static_cast<double>(value), scale, bits);
    energy += level * level, overlap += level * static_cast<long double>(value);
  }
  return overlap / std::sqrt(energy);
}

}  // namespace torchqat::math
