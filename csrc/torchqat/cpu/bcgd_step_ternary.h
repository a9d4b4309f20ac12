#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <vector>

#include "torchqat/cpu/bcgd_step_slices.h"
#include "torchqat/math/ternary_scale.h"

// The optimal ternary scale of slices; for_each_value(slice, f) calls f(y) for the values of one.
namespace torchqat {

template <typename T, typename ForEachValue>
double ternary_scale_of_slice(const Slice& slice, ForEachValue&& for_each_value, std::vector<T>& values,
                              std::vector<T>& kept) {
  values.clear();
  for_each_value(slice, [&](T y) { values.push_back(y); });
  return math::exact_ternary_scale(values.data(), static_cast<int64_t>(values.size()), kept);
}

// By all threads. How they share the work does not show in the result: what they merge are integers.
template <typename T, typename ForEachValue>
double ternary_scale_of_slices(const Slices& slices, int64_t first, int64_t last,
                               ForEachValue&& for_each_value) {
  math::MagnitudeHistogram<T> histogram;
  std::mutex merging;
  at::parallel_for(first, last, 1, [&](int64_t from, int64_t to) {
    math::MagnitudeHistogram<T> part;
    for (int64_t i = from; i < to; ++i) for_each_value(slices[i], [&](T y) { part.add(y); });
    const std::lock_guard lock(merging);
    histogram.merge(part);
  });
  std::vector<T> kept;
  return math::exact_ternary_scale(histogram, kept, [&](const auto& search, T* out) {
    std::vector<std::vector<T>> found(last - first);
    at::parallel_for(first, last, 1, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) {
        for_each_value(slices[i], [&](T y) {
          if (search.holds(y)) found[i - first].push_back(std::abs(y));
        });
      }
    });
    for (const auto& part : found) out = std::copy(part.begin(), part.end(), out);
  });
}

}  // namespace torchqat
