#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_segmented_radix_sort.cuh>
#include <limits>

#include "exact_scale.cuh"
#include "quantize_weight.cuh"
#include "torchqat/ops/layout.h"
#include "torchqat/ops/quantize_weight_device.h"

namespace torchqat {
namespace {

using math::MagnitudeSums;
using math::WeightFit;
using math::WeightMethod;

cuda::ChannelSlices slices_of(const at::Tensor& dense, std::optional<int64_t> channel_dim) {
  const auto view = channel_view(dense, wrapped(channel_dim, dense));
  return {view, dense.numel() / view.channels};
}

at::Tensor scratch(const at::Tensor& like, at::ScalarType dtype, int64_t n) {
  return at::empty({n}, like.options().dtype(dtype));
}

// Runs one of CUB's algorithms, which says how much memory it needs when it is given none.
template <typename Algorithm>
void with_temporary(const at::Tensor& like, Algorithm&& run) {
  size_t bytes = 0;
  C10_CUDA_CHECK(run(nullptr, bytes));
  const auto temporary = scratch(like, at::kByte, static_cast<int64_t>(bytes));
  C10_CUDA_CHECK(run(temporary.mutable_data_ptr(), bytes));
}

// Sorts the values of `channels` channels of `size`, each in descending order. CUB's segmented radix sort
// counts in ints; its segmented merge sort would wait for the device.
template <typename T>
void sort_group(T* values, const at::Tensor& other, int64_t channels, int64_t size, cudaStream_t stream) {
  constexpr int kBits = 8 * sizeof(T);
  cub::DoubleBuffer<T> buffers(values, other.mutable_data_ptr<T>());
  const int64_t n = channels * size;
  if (channels == 1) {
    with_temporary(other, [&](void* temporary, size_t& bytes) {
      return cub::DeviceRadixSort::SortKeysDescending(temporary, bytes, buffers, n, 0, kBits, stream);
    });
  } else {
    const auto ends = at::arange(0, n + 1, size, other.options().dtype(at::kLong));
    const auto* end = ends.const_data_ptr<int64_t>();
    with_temporary(other, [&](void* temporary, size_t& bytes) {
      return cub::DeviceSegmentedRadixSort::SortKeysDescending(temporary, bytes, buffers, static_cast<int>(n),
                                                               static_cast<int>(channels), end, end + 1, 0,
                                                               kBits, stream);
    });
  }
  if (buffers.Current() == values) return;
  C10_CUDA_CHECK(cudaMemcpyAsync(values, buffers.Current(), n * sizeof(T), cudaMemcpyDeviceToDevice, stream));
}

// The same for all channels: together where they are small, each by the whole device where they are large.
template <typename T>
void sort_channels(const at::Tensor& values, const cuda::ChannelSlices& slices, cudaStream_t stream) {
  constexpr int64_t kLarge = 1 << 20;
  const int64_t channels = slices.view.channels;
  const int64_t most = std::numeric_limits<int>::max() / slices.size;
  const int64_t group = slices.size > kLarge ? 1 : std::min(channels, most);
  const auto other = scratch(values, values.scalar_type(), group * slices.size);
  for (int64_t c = 0; c < channels; c += group) {
    sort_group(values.mutable_data_ptr<T>() + c * slices.size, other, std::min(group, channels - c),
               slices.size, stream);
  }
}

// The least-squares scales. Beside the two buffers of the sort, or the sorted values and their sums, nothing
// of the weights' size is alive: at most 12 bytes per weight, 16 for float64.
template <typename scalar_t>
void fit_exactly(const at::Tensor& in, const at::Tensor& scale, const cuda::ChannelSlices& slices,
                 int64_t bits, cudaStream_t stream) {
  using opmath_t = at::opmath_type<scalar_t>;
  const int64_t channels = slices.view.channels;
  const auto magnitudes = scratch(in, scale.scalar_type(), slices.weights());
  C10_CUDA_CHECK(cuda::launch(cuda::magnitudes_kernel<scalar_t, opmath_t>,
                              cuda::blocks_for(slices.weights(), 4), stream, in.const_data_ptr<scalar_t>(),
                              magnitudes.mutable_data_ptr<opmath_t>(), slices));
  sort_channels<opmath_t>(magnitudes, slices, stream);
  const auto sums = scratch(in, at::kDouble, slices.weights());
  const auto chunk_sums = scratch(in, at::kDouble, channels * cuda::chunks_of(slices.size));
  const auto* sorted_values = magnitudes.const_data_ptr<opmath_t>();
  auto* sum = sums.mutable_data_ptr<double>();
  auto* chunk_sum = chunk_sums.mutable_data_ptr<double>();
  C10_CUDA_CHECK(cuda::launch_prefix_sums(sorted_values, sum, chunk_sum, channels, slices.size, stream));
  C10_CUDA_CHECK(cuda::launch(cuda::exact_scale_kernel<opmath_t>, cuda::blocks_of(channels), stream,
                              sorted_values, sum, chunk_sum, scale.mutable_data_ptr<opmath_t>(), channels,
                              slices.size, math::weight_top(bits)));
}

// The scale of each channel, and the cut by which its levels are assigned.
template <typename scalar_t>
void fit(const at::Tensor& in, const at::Tensor& cut, const at::Tensor& scale,
         const cuda::ChannelSlices& slices, WeightMethod method, int64_t bits, cudaStream_t stream) {
  using opmath_t = at::opmath_type<scalar_t>;
  static_assert(sizeof(MagnitudeSums) == 16 && sizeof(WeightFit) == 16);
  const auto partial = scratch(in, at::kDouble, 2 * slices.total());
  const auto* w = in.const_data_ptr<scalar_t>();
  auto* cuts = cut.mutable_data_ptr<opmath_t>();
  auto* sums = static_cast<MagnitudeSums*>(partial.mutable_data_ptr());
  C10_CUDA_CHECK(cuda::launch_channel_sums(sums, slices, cuda::AddMagnitude<scalar_t, opmath_t>{w},
                                           cuda::SetCut<opmath_t>{cuts, method, bits, slices.size}, stream));
  if (method != WeightMethod::exact) {
    auto* fits = static_cast<WeightFit*>(partial.mutable_data_ptr());
    C10_CUDA_CHECK(cuda::launch_channel_sums(
        fits, slices, cuda::AddFit<scalar_t, opmath_t>{w, cuts, method, bits},
        cuda::SetScale<opmath_t>{scale.mutable_data_ptr<opmath_t>(), cuts}, stream));
  } else if (bits > 1) {
    fit_exactly<scalar_t>(in, scale, slices, bits, stream);
  }
}

std::tuple<at::Tensor, at::Tensor> quantize(const at::Tensor& weight, int64_t bits,
                                            std::string_view method_name,
                                            std::optional<int64_t> channel_dim) {
  const c10::cuda::CUDAGuard device(weight.device());
  auto result = quantize_weight_meta(weight, bits, method_name, channel_dim);
  const auto& [quantized, scale] = result;
  if (weight.numel() == 0) {
    scale.zero_();
    return result;
  }
  const auto in = laid_out_as(weight, quantized);
  const auto slices = slices_of(quantized, channel_dim);
  // At one bit every method is the exact one, whose cut is the scale.
  const auto method = bits == 1 ? WeightMethod::exact : weight_method("quantize_weight", method_name, bits);
  const auto cut = method == WeightMethod::exact ? scale : at::empty_like(scale);
  const auto stream = at::cuda::getCurrentCUDAStream();
  const auto dtype = weight.scalar_type();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "quantize_weight_cuda", [&] {
    using opmath_t = at::opmath_type<scalar_t>;
    fit<scalar_t>(in, cut, scale, slices, method, bits, stream);
    const cuda::Quantized<scalar_t, opmath_t> write{in.const_data_ptr<scalar_t>(),
                                                    cut.const_data_ptr<opmath_t>(),
                                                    scale.const_data_ptr<opmath_t>(), method, bits};
    C10_CUDA_CHECK(cuda::launch_write_weights(quantized.mutable_data_ptr<scalar_t>(), slices, write, stream));
  });
  return result;
}

at::Tensor codes(const at::Tensor& weight, const at::Tensor& scale, int64_t bits,
                 std::optional<int64_t> channel_dim) {
  const c10::cuda::CUDAGuard device(weight.device());
  auto levels = weight_codes_meta(weight, scale, bits, channel_dim);
  if (weight.numel() == 0) return levels;
  const auto in = laid_out_as(weight, levels);
  const auto steps = scale.contiguous();
  const auto slices = slices_of(levels, channel_dim);
  const auto stream = at::cuda::getCurrentCUDAStream();
  const auto dtype = weight.scalar_type();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "weight_codes_cuda", [&] {
    using opmath_t = at::opmath_type<scalar_t>;
    const cuda::Codes<scalar_t, opmath_t> write{in.const_data_ptr<scalar_t>(),
                                                steps.const_data_ptr<opmath_t>(), bits};
    C10_CUDA_CHECK(cuda::launch_write_weights(levels.mutable_data_ptr<int8_t>(), slices, write, stream));
  });
  return levels;
}

}  // namespace

TORCH_LIBRARY_IMPL(qat, CUDA, m) {
  m.impl("quantize_weight", quantize);
  m.impl("weight_codes", codes);
}

}  // namespace torchqat
