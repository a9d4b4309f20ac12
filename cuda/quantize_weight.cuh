#pragma once

#include <type_traits>

#include "launch.cuh"
#include "torchqat/math/channel_view.h"
#include "torchqat/math/exact_scale.h"
#include "torchqat/math/weight_method.h"

// Kernels of quantize_weight and weight_codes and their launches, over raw pointers. Weights are dense; the
// grids follow from shapes alone, and sums are added in an order that shapes fix.
namespace torchqat::cuda {

// Weights of one channel that a block adds up.
constexpr int64_t kWeightSlice = 8192;

// The weights of each channel, cut into slices.
struct ChannelSlices {
  math::ChannelView view;
  int64_t size;  // weights per channel

  __host__ __device__ int64_t per_channel() const { return (size + kWeightSlice - 1) / kWeightSlice; }
  __host__ __device__ int64_t total() const { return view.channels * per_channel(); }
  __host__ __device__ int64_t weights() const { return view.channels * size; }
};

inline unsigned blocks_of(int64_t items) { return static_cast<unsigned>(std::min(items, kMaxBlocks)); }

// partial[slice] = the sum over a slice's weights of what add(sum, channel, position) adds.
template <typename Sum, typename Add>
__global__ void __launch_bounds__(kThreads)
    sum_slices_kernel(Sum* __restrict__ partial, ChannelSlices slices, Add add) {
  for (int64_t slice = blockIdx.x; slice < slices.total(); slice += gridDim.x) {
    const int64_t channel = slice / slices.per_channel();
    const int64_t begin = slice % slices.per_channel() * kWeightSlice;
    const int64_t end = std::min(slices.size, begin + kWeightSlice);
    Sum sum{};
    for (int64_t j = begin + threadIdx.x; j < end; j += kThreads)
      add(sum, channel, slices.view.position(channel, j));
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[slice] = sum;
  }
}

// finish(channel, the sum of the channel's slices), one block per channel.
template <typename Sum, typename Finish>
__global__ void __launch_bounds__(kThreads)
    finish_channels_kernel(const Sum* __restrict__ partial, ChannelSlices slices, Finish finish) {
  for (int64_t channel = blockIdx.x; channel < slices.view.channels; channel += gridDim.x) {
    const Sum sum = sum_slots(partial + channel * slices.per_channel(), slices.per_channel());
    if (threadIdx.x == 0) finish(channel, sum);
  }
}

// Both. `partial` has room for one Sum per slice.
template <typename Sum, typename Add, typename Finish>
cudaError_t launch_channel_sums(Sum* partial, const ChannelSlices& slices, const Add& add,
                                const Finish& finish, cudaStream_t stream) {
  const auto error =
      launch(sum_slices_kernel<Sum, Add>, blocks_of(slices.total()), stream, partial, slices, add);
  if (error != cudaSuccess) return error;
  return launch(finish_channels_kernel<Sum, Finish>, blocks_of(slices.view.channels), stream, partial, slices,
                finish);
}

// The first look at the weights: the cut of each channel, as far as sums tell it.
template <typename scalar_t, typename opmath_t>
struct AddMagnitude {
  const scalar_t* weight;
  __device__ void operator()(math::MagnitudeSums& sums, int64_t, int64_t p) const {
    sums.add(static_cast<opmath_t>(weight[p]));
  }
};
template <typename opmath_t>
struct SetCut {
  opmath_t* cut;
  math::WeightMethod method;
  int64_t bits, size;
  __device__ void operator()(int64_t channel, const math::MagnitudeSums& sums) const {
    cut[channel] = static_cast<opmath_t>(sums.cut(method, bits, size));
  }
};

// The second: how well the levels that the cuts assign fit, and the best scale for them. NaN where the cut
// is.
template <typename scalar_t, typename opmath_t>
struct AddFit {
  const scalar_t* weight;
  const opmath_t* cut;
  math::WeightMethod method;
  int64_t bits;
  __device__ void operator()(math::WeightFit& fit, int64_t channel, int64_t p) const {
    const auto w = static_cast<opmath_t>(weight[p]);
    fit.add(w, math::assigned_level(w, cut[channel], method, bits));
  }
};
template <typename opmath_t>
struct SetScale {
  opmath_t* scale;
  const opmath_t* cut;
  __device__ void operator()(int64_t channel, const math::WeightFit& fit) const {
    const opmath_t c = cut[channel];
    scale[channel] = c == c ? static_cast<opmath_t>(fit.scale()) : c;
  }
};

// out[p] = write(channel of p, p) for all weights.
template <typename out_t, typename Write>
__global__ void __launch_bounds__(kThreads, 5)
    write_weights_kernel(out_t* __restrict__ out, math::ChannelView view, int64_t n, Write write) {
  for (int64_t p = grid_thread(); p < n; p += grid_threads()) out[p] = write(view.channel_at(p), p);
}

template <typename out_t, typename Write>
cudaError_t launch_write_weights(out_t* out, const ChannelSlices& slices, const Write& write,
                                 cudaStream_t stream) {
  const int64_t n = slices.weights();
  return launch(write_weights_kernel<out_t, Write>, blocks_for(n, 4), stream, out, slices.view, n, write);
}

template <typename scalar_t, typename opmath_t>
struct Quantized {
  const scalar_t* weight;
  const opmath_t* cut;
  const opmath_t* scale;
  math::WeightMethod method;
  int64_t bits;
  __device__ scalar_t operator()(int64_t channel, int64_t p) const {
    const auto w = static_cast<opmath_t>(weight[p]);
    return static_cast<scalar_t>(scale[channel] * math::assigned_level(w, cut[channel], method, bits));
  }
};
template <typename scalar_t, typename opmath_t>
struct Codes {
  const scalar_t* weight;
  const opmath_t* scale;
  int64_t bits;
  __device__ int8_t operator()(int64_t channel, int64_t p) const {
    return static_cast<int8_t>(math::weight_level(static_cast<opmath_t>(weight[p]), scale[channel], bits));
  }
};

}  // namespace torchqat::cuda
