#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <limits>

#include "feature_columns.cuh"

// Unit columns as tensor cores take them, in half precision.
namespace torchqat::cuda {

// What tensor cores take: a column is a row here, the image's row `pixel`, and a power of two brings its norm
// into [2^k, 2^(k+1)). So features lose nothing on their way into half_t, but for those of less than 2^-38 of
// the norm, and `scale` makes the unit column of them. Channels and pixels are multiples of 16; 0 fills them.
template <typename half_t>
struct ScaledColumns {
  half_t* data;
  float* scale;
  int64_t channels, pixels;

  __device__ half_t* row(int64_t image, int64_t pixel) const {
    return data + (image * pixels + pixel) * channels;
  }
};
template <typename half_t>
constexpr int kScaledExponent = 0;
template <>
inline constexpr int kScaledExponent<__half> = 14;

// The scaled columns and their scales, and where `norms` is not null the norms, (images, pixels).
template <typename half_t>
__global__ void __launch_bounds__(kThreads)
    scaled_columns_kernel(Features<const half_t> features, double eps, ScaledColumns<half_t> scaled,
                          float* __restrict__ norms) {
  __shared__ Patch<float> patch;
  __shared__ int exponents[kPatch];
  const PatchPlace place(scaled.pixels);
  const double norm = column_norm(features, place, patch);
  if (threadIdx.x < kPatch) {
    const int64_t pixel = place.pixel + threadIdx.x;
    const bool ordinary = norm > 0 && norm <= std::numeric_limits<double>::max();
    const int exponent = kScaledExponent<half_t> - (ordinary ? std::ilogb(norm) : 0);
    exponents[threadIdx.x] = exponent;
    if (pixel < scaled.pixels)
      scaled.scale[place.image * scaled.pixels + pixel] =
          static_cast<float>(std::ldexp(math::UnitColumn<double>{norm, eps}.scale(), -exponent));
    if (norms != nullptr && pixel < features.pixels)
      norms[place.image * features.pixels + pixel] = static_cast<float>(norm);
  }
  for (int64_t channel = 0; channel < scaled.channels; channel += kPatch) {
    load_patch(features, place.image, channel, place.pixel, patch);  // and exponents[] are there
    for_patch(true, [&](int c, int n, int) {
      if (channel + c < scaled.channels && place.pixel + n < scaled.pixels)
        scaled.row(place.image, place.pixel + n)[channel + c] =
            converted<half_t>(std::ldexp(patch.at[c][n], exponents[n]));
    });
  }
}

template <typename half_t>
cudaError_t launch_scaled_columns(const Features<const half_t>& features, int64_t images, double eps,
                                  const ScaledColumns<half_t>& scaled, float* norms, cudaStream_t stream) {
  return launch(scaled_columns_kernel<half_t>, patch_blocks(images, scaled.pixels), stream, features, eps,
                scaled, norms);
}

}  // namespace torchqat::cuda
