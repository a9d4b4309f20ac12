#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "torchqat/math/bcgd.h"
#include "torchqat/math/channel_view.h"

// How the CPU step cuts its work and adds up: by the shapes alone, so that no result depends on the threads.
namespace torchqat {

// Elements of one scale that are added up in one go.
constexpr int64_t kSlice = 16384;

// Elements [begin, end) of those that share a scale.
struct Slice {
  size_t target, scale;
  int64_t channel, begin, end;
};

// The slices of all scales: those of scale k are [first(k), first(k + 1)). A scale without elements has an
// empty one.
class Slices {
 public:
  void append(size_t target, int64_t channel, int64_t elements) {
    const size_t scale = first_.size() - 1;
    for (int64_t begin = 0; begin == 0 || begin < elements; begin += kSlice) {
      slices_.push_back({target, scale, channel, begin, std::min(begin + kSlice, elements)});
    }
    first_.push_back(slices_.size());
  }

  int64_t count() const { return slices_.size(); }
  int64_t scales() const { return first_.size() - 1; }
  int64_t first(int64_t scale) const { return first_[scale]; }
  const Slice& operator[](int64_t i) const { return slices_[i]; }

 private:
  std::vector<Slice> slices_;
  std::vector<int64_t> first_{0};
};

// Calls f(position, count) for the runs of consecutive memory in a slice.
template <typename F>
void for_each_run(const math::ChannelView& view, const Slice& slice, F&& f) {
  if (view.channels == 1) return f(slice.begin, slice.end - slice.begin);
  for (int64_t j = slice.begin; j < slice.end;) {
    const int64_t count = std::min(slice.end - j, view.inner - j % view.inner);
    f(view.position(slice.channel, j), count);
    j += count;
  }
}

// Sums kept apart by lanes, so that one addition need not wait for the one before.
template <typename T>
class LaneSums {
 public:
  // Adds the magnitudes f(i), i = 0 .. count - 1, and their levels.
  template <typename F, typename Level>
  void add(int64_t count, const Level& level, F&& f) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) add_one(lane, f(i + lane), level);
    }
    for (int lane = 0; i < count; ++i, ++lane) add_one(lane, f(i), level);
  }

  math::StepSums total() const {
    math::StepSums sums;
    for (const auto& lane : lanes_) sums = sums + lane;
    return sums;
  }

 private:
  static constexpr int kLanes = 8;

  template <typename Level>
  void add_one(int lane, T magnitude, const Level& level) {
    lanes_[lane].add(magnitude, level(magnitude));
  }

  math::StepSums lanes_[kLanes];
};

}  // namespace torchqat
