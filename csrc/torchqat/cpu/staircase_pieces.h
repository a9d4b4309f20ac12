#pragma once

#include <algorithm>
#include <cstdint>

#include "torchqat/cpu/simd_memory.h"
#include "torchqat/cpu/simd_sums.h"
#include "torchqat/cpu/staircase_kernels.h"
#include "torchqat/math/staircase.h"
#include "torchqat/math/step_codes.h"

// How the loops of staircase_relu cut memory where the step size changes.
namespace torchqat::TORCHQAT_ISA {

static_assert(kGroup % math::kCodesTogether == 0);

// The staircases of a piece of memory, by the place in it, and what the piece adds to the sums of channels.
// A piece that lies in one channel, ...
template <typename T>
struct OneChannel {
  const math::Staircase<Vec<T>> stair;
  const int64_t channel;

  const auto& at(int64_t) const { return stair; }

  struct Sums {
    LaneSums lanes;
    void add(const OneChannel&, int64_t, int lane, Vec<T> v, double*) { lanes.add(lane, v); }
    void finish(const OneChannel& piece, double* sums) const { sums[piece.channel] += lanes.total(); }
  };
};

// ... one whose elements belong to channels that follow one another, ...
template <typename T>
struct ChannelRow {
  const T* alpha;  // of the first
  const int64_t channel;
  const int64_t bits;

  auto at(int64_t place) const { return math::Staircase<Vec<T>>(load(alpha + place), bits); }

  struct Sums {
    void add(const ChannelRow& piece, int64_t place, int, Vec<T> v, double* sums) {
      add_lanes(sums + piece.channel + place, v);
    }
    void finish(const ChannelRow&, double*) const {}
  };
};

// ... and a group of any channels.
template <typename T>
struct MixedLanes {
  T alpha[kGroup];
  int64_t channel[kGroup];
  int64_t bits;

  auto at(int64_t place) const { return math::Staircase<Vec<T>>(load(alpha + place), bits); }

  struct Sums {
    double lanes[kGroup] = {};
    void add(const MixedLanes&, int64_t, int lane, Vec<T> v, double*) { add_lanes(lanes + lane, v); }
    void finish(const MixedLanes& piece, double* sums) const {
      for (int i = 0; i < kGroup; ++i) sums[piece.channel[i]] += lanes[i];
    }
  };
};

// Where an element's channel changes.
struct ChannelWalk {
  const math::ChannelView view;
  int64_t channel;
  int64_t left;  // elements of the channel's run, at least one

  ChannelWalk(const math::ChannelView& v, int64_t position)
      : view(v), channel(position / v.inner % v.channels), left(v.inner - position % v.inner) {}
  void pass(int64_t count) {
    left -= count;
    if (left > 0) return;
    left = view.inner;
    channel = channel + 1 == view.channels ? 0 : channel + 1;
  }
};

// Calls f(first, last, piece) for pieces of [begin, end) that follow one another, each beginning at a
// multiple of eight.
template <typename T, typename F>
void for_each_piece(const StepSizes<T>& steps, int64_t begin, int64_t end, F&& f) {
  const auto one_channel = [&](int64_t c) { return OneChannel<T>{{Vec<T>(steps.alpha[c]), steps.bits}, c}; };
  if (begin == end) return;  // and alpha may have no element
  if (steps.view.channels == 1) return f(begin, end, one_channel(0));
  ChannelWalk walk(steps.view, begin);
  for (int64_t first = begin; first < end;) {
    const bool is_row = steps.view.inner == 1;
    const int64_t alike = is_row ? steps.view.channels - walk.channel : walk.left;
    const int64_t whole = std::min(alike, end - first) / kGroup * kGroup;
    const int64_t next = std::min(end, first + std::max<int64_t>(whole, kGroup));
    if (whole > 0 && is_row) {
      f(first, next, ChannelRow<T>{steps.alpha + walk.channel, walk.channel, steps.bits});
      walk.channel += whole - 1;
      walk.pass(1);
    } else if (whole > 0) {
      f(first, next, one_channel(walk.channel));
      walk.pass(whole);
    } else {
      MixedLanes<T> lanes{{}, {}, steps.bits};
      for (int i = 0; i < kGroup; ++i) {
        lanes.channel[i] = walk.channel;
        lanes.alpha[i] = steps.alpha[walk.channel];
        walk.pass(1);
      }
      f(first, next, lanes);
    }
    first = next;
  }
}

}  // namespace torchqat::TORCHQAT_ISA
