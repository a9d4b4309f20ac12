#pragma once

#include "launch.cuh"
#include "torchqat/math/channel_view.h"
#include "torchqat/math/region_code.h"
#include "torchqat/math/staircase.h"

// What a thread of the kernels of staircase_relu takes: the eight elements that share a region word, and the
// step sizes of their channels.
namespace torchqat::cuda {

constexpr int kGroup = math::kRegionsPerWord;

// The step sizes of a tensor, read on the device.
template <typename opmath_t>
struct StepSizes {
  const opmath_t* alpha;
  math::ChannelView view;
  int64_t bits;

  __device__ math::Staircase<opmath_t> of_channel(int64_t channel) const { return {alpha[channel], bits}; }
};

// Steps through consecutive positions and knows the channel of each without a division for each.
struct ChannelWalk {
  math::ChannelView view;
  int64_t channel;
  int64_t left;  // elements of the current run, this one included

  __device__ ChannelWalk(const math::ChannelView& v, int64_t position)
      : view(v), channel(v.channel_at(position)) {
    left = view.inner - (view.channels == 1 ? position : position % view.inner);
  }
  __device__ void next() {
    if (--left > 0) return;
    left = view.inner;
    channel = channel + 1 == view.channels ? 0 : channel + 1;
  }
};

// Up to eight elements from position `begin` on; those past n are 0.
template <typename T>
__device__ __forceinline__ Pack<T, kGroup> load_group(const T* from, int64_t begin, int64_t n, bool packed) {
  if (packed && begin + kGroup <= n) return load_pack<kGroup>(from + begin);
  Pack<T, kGroup> group;
  TORCHQAT_UNROLL
  for (int i = 0; i < kGroup; ++i) group[i] = begin + i < n ? from[begin + i] : T(0);
  return group;
}

template <typename T>
__device__ __forceinline__ void store_group(T* to, int64_t begin, int64_t n, bool packed,
                                            const Pack<T, kGroup>& group) {
  if (packed && begin + kGroup <= n) return store_pack(to + begin, group);
  TORCHQAT_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    if (begin + i < n) to[begin + i] = group[i];
  }
}

}  // namespace torchqat::cuda
