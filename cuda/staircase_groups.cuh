#pragma once

#include "launch.cuh"
#include "torchqat/math/channel_view.h"
#include "torchqat/math/staircase.h"
#include "torchqat/math/step_codes.h"

// What a thread of the kernels of staircase_relu takes: eight elements, whose codes are packed together, and
// the step sizes of their channels.
namespace torchqat::cuda {

constexpr int kGroup = math::kCodesTogether;

// The packed codes of eight elements: regions, with one bit also states (2 bits), or states.
template <int bits>
using CodeGroup = Pack<uint8_t, bits>;

template <int bits, typename opmath_t>
__device__ void put_code(CodeGroup<bits>& group, int i, opmath_t x, const math::Staircase<opmath_t>& stair) {
  unsigned code = 0;
  if constexpr (bits == math::kRegionBits) {
    code = static_cast<unsigned>(stair.region(x));
  } else {
    code = static_cast<unsigned>(stair.state(x));
  }
  math::put_code<bits>(group.value, i, code);
}

template <int bits, typename opmath_t>
__device__ math::RegionBits<bool> region_bits(unsigned code, const math::Staircase<opmath_t>& stair) {
  if constexpr (bits == math::kRegionBits) return math::bits_of(static_cast<math::Region>(code));
  return stair.region_bits_of_state(static_cast<opmath_t>(code));
}

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
