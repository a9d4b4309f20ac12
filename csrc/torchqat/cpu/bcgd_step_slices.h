#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

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

}  // namespace torchqat
