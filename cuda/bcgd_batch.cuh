#pragma once

#include <cstdint>
#include <type_traits>

#include "launch.cuh"
#include "torchqat/math/bcgd.h"
#include "torchqat/math/channel_view.h"

// Hundreds of parameters as one kernel argument, and how blocks find their share of them. What belongs to one
// scale is cut into slices, one block each, so the grid and the order of every sum depend on shapes alone.
namespace torchqat::cuda {

constexpr int kMaxTensors = 320;  // what fits in the 32764 bytes of a kernel's arguments
constexpr int64_t kSliceElements = 16 * kThreads;
// Scales of more elements are fitted by many blocks where the others have one, as is worth while when each
// block has a histogram of its own to fill and to hand in.
constexpr int64_t kLargeSliceElements = 128 * kThreads;

template <typename scalar_t, typename opmath_t>
struct StepTensor {
  scalar_t* w;
  const scalar_t* g;
  opmath_t* y;
  opmath_t* buffer;  // null without momentum
  opmath_t* scale;   // one for each channel
  float* steps;      // null without momentum
  math::ChannelView view;
  int64_t per_scale;  // elements
};

// Where the blocks of each tensor begin, all tensors before it counted; the last entry is the number of all.
template <int kCapacity>
struct BlockIndex {
  unsigned first[kCapacity + 1];

  // The tensor of a block. One without blocks is never found.
  __device__ int tensor_of(unsigned block, int count) const {
    int low = 0;
    int high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first[middle] <= block) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};

TORCHQAT_HD constexpr int64_t slices_for(int64_t elements, int64_t per_slice) {
  return elements == 0 ? 1 : (elements + per_slice - 1) / per_slice;
}

template <typename scalar_t, typename opmath_t, int kCapacity = kMaxTensors>
struct StepBatch {
  using Opmath = opmath_t;
  using Index = BlockIndex<kCapacity>;

  StepTensor<scalar_t, opmath_t> tensors[kCapacity];
  Index slices;  // of kSliceElements
  Index scales;
  Index large_slices;  // of kLargeSliceElements, for scales of more than that
  Index large_scales;
  int count;
  int bits;
  math::Projection projection;
  math::StepRule<opmath_t> rule;
  // On the device, or null. The rule then holds 1 in their place.
  const opmath_t* lr;
  const opmath_t* grad_scale;
  const opmath_t* found_inf;

  TORCHQAT_HD static bool is_large(int64_t per_scale) { return per_scale > kLargeSliceElements; }
  bool is_full() const { return count == kCapacity; }
  unsigned slice_count() const { return slices.first[count]; }
  unsigned scale_count() const { return scales.first[count]; }
  unsigned large_scale_count() const { return large_scales.first[count]; }

  void append(const StepTensor<scalar_t, opmath_t>& t) {
    const auto channels = static_cast<unsigned>(t.view.channels);
    const unsigned large_channels = is_large(t.per_scale) ? channels : 0;
    const auto add = [&](Index& index, unsigned blocks) {
      index.first[count + 1] = index.first[count] + blocks;
    };
    add(slices, channels * static_cast<unsigned>(slices_for(t.per_scale, kSliceElements)));
    add(scales, channels);
    add(large_slices, large_channels * static_cast<unsigned>(slices_for(t.per_scale, kLargeSliceElements)));
    add(large_scales, large_channels);
    tensors[count++] = t;
  }

  __device__ bool is_skipped() const { return found_inf && *found_inf != opmath_t(0); }
  __device__ math::StepRule<opmath_t> rule_here() const {
    auto here = rule;
    if (lr) here.lr = *lr;
    if (grad_scale) here.divisor *= *grad_scale;
    return here;
  }
};

// Elements [begin, end) of those that share a scale.
struct SliceOfTensor {
  int tensor;
  unsigned scale;  // in the index of scales that was asked for
  int64_t channel, begin, end;
};

// The slice of this block, of `per_slice` elements.
template <typename Batch>
__device__ SliceOfTensor slice_of_block(const Batch& batch, const typename Batch::Index& blocks,
                                        const typename Batch::Index& scales, int64_t per_slice) {
  SliceOfTensor s;
  s.tensor = blocks.tensor_of(blockIdx.x, batch.count);
  const int64_t elements = batch.tensors[s.tensor].per_scale;
  const auto slices = static_cast<unsigned>(slices_for(elements, per_slice));
  const unsigned block = blockIdx.x - blocks.first[s.tensor];
  s.channel = block / slices;
  s.scale = scales.first[s.tensor] + block / slices;
  s.begin = block % slices * per_slice;
  s.end = s.begin + per_slice < elements ? s.begin + per_slice : elements;
  return s;
}

// Calls f(memory position, Packed<n>) for this thread's elements of a slice: n elements that follow one
// another and may be moved as packs, or one.
template <int n>
using Packed = std::integral_constant<int, n>;

template <int kMost, typename Tensor, typename F>
__device__ __forceinline__ void for_each_pack(const Tensor& t, const SliceOfTensor& s, F&& f) {
  const bool consecutive = t.view.channels == 1 || t.view.inner == t.per_scale;
  const int64_t base = s.channel * t.per_scale;
  const bool packed =
      base % kMost == 0 && pack_aligned<kMost>(t.w, t.g) && pack_aligned<kMost>(t.y, t.buffer);
  int64_t first = s.begin;
  if (consecutive) {
    first = s.begin + (s.end - s.begin) / kMost * kMost;
    for (int64_t j = s.begin + int64_t{threadIdx.x} * kMost; j < first; j += kThreads * kMost) {
      if (packed) {
        f(base + j, Packed<kMost>());
      } else {  // in the same order: sums do not show where memory begins
        for (int i = 0; i < kMost; ++i) f(base + j + i, Packed<1>());
      }
    }
  }
  for (int64_t j = first + threadIdx.x; j < s.end; j += kThreads) {
    f(consecutive ? base + j : t.view.position(s.channel, j), Packed<1>());
  }
}

// Calls f(y) for this thread's elements of a slice; a pack of 8 is two or more accesses at once.
template <typename Tensor, typename F>
__device__ __forceinline__ void for_each_latent(const Tensor& t, const SliceOfTensor& s, F&& f) {
  for_each_pack<8>(t, s, [&](int64_t p, auto n) {
    const auto y = load_pack<n()>(t.y + p);
    TORCHQAT_UNROLL
    for (int i = 0; i < n(); ++i) f(y[i]);
  });
}

}  // namespace torchqat::cuda
