#pragma once

#include <cmath>

#include "launch.cuh"
#include "torchqat/math/feature_affinity.h"

// From features to unit columns and back: kernels of feature_affinity_loss that read and write each feature a
// few times, whatever order memory has it in.
namespace torchqat::cuda {

// Features of some images, or their gradients, with the strides of their tensor.
template <typename T>
struct Features {
  T* data;
  int64_t channels, pixels;
  int64_t image_stride, channel_stride, pixel_stride;

  __device__ T& at(int64_t image, int64_t channel, int64_t pixel) const {
    return data[image * image_stride + channel * channel_stride + pixel * pixel_stride];
  }
  // Neighbors in memory are channels of one pixel, as in channels-last.
  __device__ bool channels_are_neighbors() const { return channel_stride < pixel_stride; }
};

// A matrix for each image, channels x pixels. A row may be longer than the pixels: 0 fills it.
template <typename T>
struct UnitColumns {
  T* data;
  int64_t channels, row, image_stride;

  __device__ T* image(int64_t i) const { return data + i * image_stride; }
};

// Between the types of memory and of arithmetic; a half-precision type converts to float alone.
template <typename T, typename scalar_t>
__device__ __forceinline__ T converted(scalar_t value) {
  if constexpr (sizeof(scalar_t) == 2 || sizeof(T) == 2) {
    return static_cast<T>(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A block takes this many pixels of an image, and this many of their channels at a time.
constexpr int kPatch = 32;
constexpr int kPatchRows = kThreads / kPatch;

// Indexed by channel and pixel. The odd length of a row puts a column of it in different banks.
template <typename T>
struct Patch {
  T at[kPatch][kPatch + 1];
};

// Calls visit(channel, pixel, k) for the elements of a patch that are this thread's. Neighboring threads get
// neighboring channels or neighboring pixels.
template <typename Visit>
__device__ __forceinline__ void for_patch(bool neighbors_are_channels, Visit visit) {
  const int fast = static_cast<int>(threadIdx.x) % kPatch;
  const int slow = static_cast<int>(threadIdx.x) / kPatch;
  TORCHQAT_UNROLL
  for (int k = 0; k < kPatch / kPatchRows; ++k) {
    const int other = slow + k * kPatchRows;
    visit(neighbors_are_channels ? fast : other, neighbors_are_channels ? other : fast, k);
  }
}

// The patch from `channel` and `pixel` on; 0 where the features end. All threads of the block must come here.
template <typename T, typename scalar_t>
__device__ __forceinline__ void load_patch(const Features<scalar_t>& from, int64_t image, int64_t channel,
                                           int64_t pixel, Patch<T>& patch) {
  const bool by_channels = from.channels_are_neighbors();
  T values[kPatch / kPatchRows];
  for_patch(by_channels, [&](int c, int n, int k) {
    const bool inside = channel + c < from.channels && pixel + n < from.pixels;
    values[k] = inside ? converted<T>(from.at(image, channel + c, pixel + n)) : T(0);
  });
  __syncthreads();  // what was done with the patch before
  for_patch(by_channels, [&](int c, int n, int k) { patch.at[c][n] = values[k]; });
  __syncthreads();
}

// A block's place: its image and the first of its pixels.
struct PatchPlace {
  int64_t image, pixel;

  __device__ explicit PatchPlace(int64_t pixels)
      : image(blockIdx.x / ((pixels + kPatch - 1) / kPatch)),
        pixel(blockIdx.x % ((pixels + kPatch - 1) / kPatch) * kPatch) {}
};
inline unsigned patch_blocks(int64_t images, int64_t pixels) {
  return static_cast<unsigned>(images * ((pixels + kPatch - 1) / kPatch));
}

// The sum of what the threads of a pixel (their number modulo kPatch) bring, in each of them. All threads of
// the block must come here.
__device__ __forceinline__ double sum_of_pixel(double value) {
  __shared__ double values[kPatchRows][kPatch];
  const int pixel = static_cast<int>(threadIdx.x) % kPatch;
  __syncthreads();  // the sum before this one may still be reading
  values[threadIdx.x / kPatch][pixel] = value;
  __syncthreads();
  double sum = 0;
  TORCHQAT_UNROLL
  for (int k = 0; k < kPatchRows; ++k) sum += values[k][pixel];
  return sum;
}

// The norm of the column of this thread's pixel, from squares that are added in double: neither bfloat16 nor
// float32 overflows or vanishes. All threads of the block must come here.
template <typename T, typename scalar_t>
__device__ double column_norm(const Features<scalar_t>& features, const PatchPlace& place, Patch<T>& patch) {
  double squares = 0;
  for (int64_t channel = 0; channel < features.channels; channel += kPatch) {
    load_patch(features, place.image, channel, place.pixel, patch);
    for_patch(false, [&](int c, int n, int) {
      const auto v = static_cast<double>(patch.at[c][n]);
      squares += v * v;
    });
  }
  return std::sqrt(sum_of_pixel(squares));
}

// The unit columns, and where `norms` is not null the norms, (images, pixels).
template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads) unit_columns_kernel(Features<const scalar_t> features, double eps,
                                                                UnitColumns<T> unit, T* __restrict__ norms) {
  __shared__ Patch<T> patch;
  const PatchPlace place(unit.row);
  const double norm = column_norm(features, place, patch);
  const int64_t pixel = place.pixel + threadIdx.x % kPatch;
  if (norms != nullptr && threadIdx.x < kPatch && pixel < features.pixels)
    norms[place.image * features.pixels + pixel] = static_cast<T>(norm);
  const double scale = math::UnitColumn<double>{norm, eps}.scale();
  for (int64_t channel = 0; channel < features.channels; channel += kPatch) {
    load_patch(features, place.image, channel, place.pixel, patch);
    for_patch(false, [&](int c, int n, int) {
      if (channel + c < features.channels && pixel < unit.row)
        unit.image(place.image)[(channel + c) * unit.row + pixel] =
            static_cast<T>(static_cast<double>(patch.at[c][n]) * scale);
    });
  }
}

template <typename scalar_t, typename T>
cudaError_t launch_unit_columns(const Features<const scalar_t>& features, int64_t images, double eps,
                                const UnitColumns<T>& unit, T* norms, cudaStream_t stream) {
  return launch(unit_columns_kernel<scalar_t, T>, patch_blocks(images, unit.row), stream, features, eps, unit,
                norms);
}

// The gradient in the features, times a factor, from that in their unit columns, of which `features` and the
// norms tell the rest.
template <typename scalar_t, typename T, typename out_t>
__global__ void __launch_bounds__(kThreads)
    unit_columns_backward_kernel(Features<const T> grad, Features<const scalar_t> features,
                                 const T* __restrict__ norms, double eps, double factor,
                                 Features<out_t> grad_features) {
  __shared__ Patch<T> patch, grad_patch;
  const PatchPlace place(features.pixels);
  const int64_t pixel = place.pixel + threadIdx.x % kPatch;
  const bool inside = pixel < features.pixels;
  const math::UnitColumn<double> column{
      inside ? static_cast<double>(norms[place.image * features.pixels + pixel]) : 0.0, eps};
  double overlap = 0;
  const auto load = [&](int64_t channel) {
    load_patch(features, place.image, channel, place.pixel, patch);
    load_patch(grad, place.image, channel, place.pixel, grad_patch);
  };
  for (int64_t channel = 0; channel < features.channels; channel += kPatch) {
    load(channel);
    for_patch(false, [&](int c, int n, int) {
      overlap += static_cast<double>(grad_patch.at[c][n]) * static_cast<double>(patch.at[c][n]);
    });
  }
  overlap = sum_of_pixel(overlap);
  for (int64_t channel = 0; channel < features.channels; channel += kPatch) {
    load(channel);
    for_patch(false, [&](int c, int n, int) {
      const double element = column.gradient(static_cast<double>(grad_patch.at[c][n]),
                                             static_cast<double>(patch.at[c][n]), overlap);
      patch.at[c][n] = static_cast<T>(factor * element);
    });
    __syncthreads();
    for_patch(grad_features.channels_are_neighbors(), [&](int c, int n, int) {
      if (channel + c < features.channels && place.pixel + n < features.pixels)
        grad_features.at(place.image, channel + c, place.pixel + n) = converted<out_t>(patch.at[c][n]);
    });
  }
}

template <typename scalar_t, typename T, typename out_t>
cudaError_t launch_unit_columns_backward(const Features<const T>& grad,
                                         const Features<const scalar_t>& features, int64_t images,
                                         const T* norms, double eps, double factor,
                                         const Features<out_t>& grad_features, cudaStream_t stream) {
  return launch(unit_columns_backward_kernel<scalar_t, T, out_t>, patch_blocks(images, features.pixels),
                stream, grad, features, norms, eps, factor, grad_features);
}

}  // namespace torchqat::cuda
