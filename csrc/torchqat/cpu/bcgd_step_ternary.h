#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "torchqat/cpu/bcgd_step_slices.h"
#include "torchqat/math/ternary_near.h"

namespace torchqat {

// The optimal ternary scales of weights that a step moves. How threads share the work does not show in them.
template <typename T>
class TernaryScales {
 public:
  // `scales` are those before, and become the new ones.
  TernaryScales(const Slices& slices, std::vector<T>& scales)
      : slices_(slices), scales_(scales), windows_(slices.scales()), found_(slices.count()) {}

  // update(slice, edges, sums, end) makes the new y, adds to the sums and puts the magnitudes near the scale
  // before at *end, which moves on; gather(slice, window, above, end) does the same with those in a window.
  template <typename Update, typename Gather>
  void find(Update&& update, Gather&& gather) {
    std::vector<math::TernarySums> sums(slices_.count());
    for_each_slice([&](const Slice& slice, int64_t i, T** end) {
      update(slice, math::TernaryEdges<T>(scales_[slice.scale]), sums[i], end);
    });
    for_each_scale([&](int64_t k) {
      const auto total = total_of(k, sums);
      const math::TernaryEdges<T> edges(scales_[k]);
      const auto near = best_of(k, edges.near(), total.above[math::kNear]);
      windows_[k] = math::window_beyond(edges, total, near);
      if (!windows_[k]) scales_[k] = static_cast<T>(near.scale());
    });
    if (std::none_of(windows_.begin(), windows_.end(), [](const auto& w) { return w.has_value(); })) return;
    std::vector<math::WeightFit> above(slices_.count());
    for_each_slice([&](const Slice& slice, int64_t i, T** end) {
      if (const auto& window = windows_[slice.scale]) gather(slice, *window, above[i], end);
    });
    for_each_scale([&](int64_t k) {
      if (const auto& window = windows_[k])
        scales_[k] = static_cast<T>(best_of(k, *window, total_of(k, above)).scale());
    });
  }

 private:
  // Calls f(slice, i, end) with room at *end for all values of the slice and a vector more; what it puts
  // there becomes found_[i].
  template <typename F>
  void for_each_slice(F&& f) {
    constexpr int64_t kMore = 16;
    at::parallel_for(0, slices_.count(), slices_.grain(), [&](int64_t from, int64_t to) {
      const auto room = std::make_unique_for_overwrite<T[]>(kSlice + kMore);
      for (int64_t i = from; i < to; ++i) {
        T* end = room.get();
        f(slices_[i], i, &end);
        found_[i].assign(room.get(), end);
      }
    });
  }

  template <typename F>
  void for_each_scale(F&& f) const {
    at::parallel_for(0, slices_.scales(), 1, [&](int64_t from, int64_t to) {
      for (int64_t k = from; k < to; ++k) f(k);
    });
  }

  template <typename Sums>
  Sums total_of(int64_t k, const std::vector<Sums>& sums) const {
    Sums total = sums[slices_.first(k)];
    for (int64_t i = slices_.first(k) + 1; i < slices_.first(k + 1); ++i) total = total + sums[i];
    return total;
  }

  math::WeightFit best_of(int64_t k, const math::MagnitudeWindow<T>& window, const math::WeightFit& above) {
    std::vector<T> kept;
    for (int64_t i = slices_.first(k); i < slices_.first(k + 1); ++i)
      kept.insert(kept.end(), found_[i].begin(), found_[i].end());
    math::TernarySearch<T> search(window, above);
    search.run(kept);
    return search.best();
  }

  const Slices& slices_;
  std::vector<T>& scales_;
  std::vector<std::optional<math::MagnitudeWindow<T>>> windows_;  // by scale: where to look again
  std::vector<std::vector<T>> found_;                             // by slice
};

}  // namespace torchqat
