#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <numeric>
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
    elements_ += elements;
  }

  int64_t count() const { return slices_.size(); }
  int64_t scales() const { return first_.size() - 1; }
  int64_t first(int64_t scale) const { return first_[scale]; }
  // How many slices are worth a thread: as many as have the elements of two full ones.
  int64_t grain() const { return 1 + 2 * kSlice * count() / (elements_ + kSlice); }
  const Slice& operator[](int64_t i) const { return slices_[i]; }

 private:
  std::vector<Slice> slices_;
  std::vector<int64_t> first_{0};
  int64_t elements_ = 0;
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

// Calls f(lane, i) for i in [0, count), with lane = i modulo kLanes. What is kept apart by lanes need not
// wait for the operation before, and is SIMD code again.
constexpr int kLanes = 8;
template <typename F>
void for_each_lane(int64_t count, F&& f) {
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) f(lane, i + lane);
  }
  for (int64_t i = whole; i < count; ++i) f(static_cast<int>(i - whole), i);
}

// What the values of a run say about one assignment of levels.
template <typename T, typename Level>
math::WeightFit fit_of(const T* y, int64_t count, const Level& level) {
  T q[kLongestRun];
  find_levels(y, count, level, q);
  double overlap[kLanes] = {};
  double energy[kLanes] = {};
  for_each_lane(count, [&](int lane, int64_t i) {
    overlap[lane] += static_cast<double>(std::abs(y[i])) * static_cast<double>(q[i]);
    energy[lane] += static_cast<double>(q[i]) * static_cast<double>(q[i]);
  });
  math::WeightFit fit;
  for (int lane = 0; lane < kLanes; ++lane) fit = fit + math::WeightFit{energy[lane], overlap[lane]};
  return fit;
}
template <typename T>
math::WeightFit fit_of(const T* y, int64_t count, const math::TopLevel<T>&) {
  double overlap[kLanes] = {};
  for_each_lane(count, [&](int lane, int64_t i) { overlap[lane] += static_cast<double>(std::abs(y[i])); });
  return {static_cast<double>(count), std::accumulate(overlap, overlap + kLanes, 0.0)};
}

template <typename T>
T peak_of(const T* y, int64_t count) {
  T peak[kLanes] = {};
  for_each_lane(count, [&](int lane, int64_t i) {
    peak[lane] = std::abs(y[i]) > peak[lane] ? std::abs(y[i]) : peak[lane];
  });
  return *std::max_element(peak, peak + kLanes);
}

// The sums over `count` consecutive values of y; the peak only where it is asked for.
template <typename T, typename Level, size_t N>
math::StepSums<N> sums_of(const T* y, int64_t count, const std::array<Level, N>& levels, bool peak) {
  math::StepSums<N> sums;
  for (size_t i = 0; i < N; ++i) sums.fits[i] = fit_of(y, count, levels[i]);
  if (peak) sums.peak = peak_of(y, count);
  return sums;
}

}  // namespace torchqat
