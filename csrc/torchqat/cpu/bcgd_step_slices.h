#pragma once

#include <algorithm>
#include <array>
#include <cmath>
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

// Elements that are worked on while the first-level cache holds them.
constexpr int64_t kLongestRun = 2048;

// Calls f(position, count) for the runs of consecutive memory in a slice, kLongestRun elements at most.
template <typename F>
void for_each_run(const math::ChannelView& view, const Slice& slice, F&& f) {
  for (int64_t j = slice.begin; j < slice.end;) {
    const int64_t to_next = view.channels == 1 ? kLongestRun : view.inner - j % view.inner;
    const int64_t count = std::min({slice.end - j, to_next, kLongestRun});
    f(view.position(slice.channel, j), count);
    j += count;
  }
}

// The levels of the magnitudes of a run. A loop of its own is what compilers turn into SIMD code.
template <typename T, typename Level>
void find_levels(const T* y, int64_t count, const Level level, T* q) {
  for (int64_t i = 0; i < count; ++i) q[i] = level(std::abs(y[i]));
}

// What the values of a run say about one assignment of levels.
template <typename T, typename Level>
math::WeightFit fit_of(const T* y, int64_t count, const Level& level) {
  T q[kLongestRun];
  find_levels(y, count, level, q);
  // Kept apart by lanes, so that one addition need not wait for the one before.
  constexpr int kLanes = 8;
  double overlap[kLanes] = {};
  double energy[kLanes] = {};
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      overlap[lane] += double(std::abs(y[i + lane])) * double(q[i + lane]);
      energy[lane] += double(q[i + lane]) * double(q[i + lane]);
    }
  }
  math::WeightFit fit;
  for (int lane = 0; lane < kLanes; ++lane) fit = fit + math::WeightFit{energy[lane], overlap[lane]};
  for (int64_t i = whole; i < count; ++i) fit.add(std::abs(y[i]), q[i]);
  return fit;
}

// The sums over `count` consecutive values of y.
template <typename T, typename Level, size_t N>
math::StepSums<N> sums_of(const T* y, int64_t count, const std::array<Level, N>& levels) {
  math::StepSums<N> sums;
  for (size_t i = 0; i < N; ++i) sums.fits[i] = fit_of(y, count, levels[i]);
  T peak = 0;
  for (int64_t i = 0; i < count; ++i) peak = std::abs(y[i]) > peak ? std::abs(y[i]) : peak;
  sums.peak = peak;
  return sums;
}

}  // namespace torchqat
