#pragma once

#include <type_traits>

#include "staircase_groups.cuh"
#include "torchqat/math/staircase_backward.h"

// Kernels of staircase_relu and their launches, over raw pointers. Every tensor is dense and in the same
// memory order. The launches decide the grid from shapes alone.
namespace torchqat::cuda {

// Groups of x that a thread loads before it works on the first: 32 bytes.
template <typename scalar_t>
constexpr int kGroupsAtOnce = sizeof(scalar_t) == 2 ? 2 : 1;

// y = the staircase of x, or its step indices when out_t is uint8_t; in `kept`, of that many bits each, the
// packed regions (2) or states; nothing for 0.
template <int kept_bits, typename scalar_t, typename opmath_t, typename out_t>
__global__ void __launch_bounds__(kThreads)
    staircase_relu_kernel(const scalar_t* __restrict__ x, out_t* __restrict__ y, uint8_t* __restrict__ kept,
                          StepSizes<opmath_t> steps, int64_t n, bool packed) {
  constexpr int kAtOnce = kGroupsAtOnce<scalar_t>;
  const auto finish = [&](int64_t g, const Pack<scalar_t, kGroup>& in) {
    const int64_t begin = g * kGroup;
    Pack<out_t, kGroup> out;
    [[maybe_unused]] CodeGroup<std::max(kept_bits, 1)> codes{};
    ChannelWalk at(steps.view, begin);
    auto stair = steps.of_channel(at.channel);
    TORCHQAT_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      const auto v = static_cast<opmath_t>(in[i]);
      if constexpr (std::is_same_v<out_t, uint8_t>) {
        out[i] = static_cast<uint8_t>(static_cast<int>(stair.code(v)));
      } else {
        out[i] = static_cast<out_t>(stair(v));
      }
      if constexpr (kept_bits > 0) {
        if (begin + i < n) put_code<kept_bits>(codes, i, v, stair);
      }
      const int64_t channel = at.channel;
      at.next();
      if (at.channel != channel) stair = steps.of_channel(at.channel);
    }
    store_group(y, begin, n, packed, out);
    if constexpr (kept_bits > 0) store_pack(kept + g * kept_bits, codes);
  };
  const int64_t groups = (n + kGroup - 1) / kGroup;
  for (int64_t g = grid_thread(); g < groups; g += grid_threads() * kAtOnce) {
    Pack<scalar_t, kGroup> in[kAtOnce];
    TORCHQAT_UNROLL
    for (int k = 0; k < kAtOnce; ++k) in[k] = load_group(x, (g + k * grid_threads()) * kGroup, n, packed);
    TORCHQAT_UNROLL
    for (int k = 0; k < kAtOnce; ++k) {
      if (g + k * grid_threads() < groups) finish(g + k * grid_threads(), in[k]);
    }
  }
}

template <int kept_bits, typename opmath_t, typename scalar_t, typename out_t>
cudaError_t launch_staircase_relu(const scalar_t* x, out_t* y, uint8_t* kept,
                                  const StepSizes<opmath_t>& steps, int64_t n, cudaStream_t stream) {
  return launch(staircase_relu_kernel<kept_bits, scalar_t, opmath_t, out_t>,
                blocks_for(n, kGroup * kGroupsAtOnce<scalar_t>), stream, x, y, kept, steps, n,
                pack_aligned<kGroup>(x, y));
}

// y once more, from its packed states.
template <int code_bits, typename scalar_t, typename opmath_t>
__global__ void __launch_bounds__(kThreads)
    staircase_relu_rebuild_kernel(const uint8_t* __restrict__ codes, scalar_t* __restrict__ y,
                                  StepSizes<opmath_t> steps, int64_t n, bool packed) {
  const int64_t groups = (n + kGroup - 1) / kGroup;
  for (int64_t g = grid_thread(); g < groups; g += grid_threads()) {
    const auto group = load_pack<code_bits>(codes + g * code_bits);
    Pack<scalar_t, kGroup> out;
    ChannelWalk at(steps.view, g * kGroup);
    auto stair = steps.of_channel(at.channel);
    TORCHQAT_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      const auto state = static_cast<opmath_t>(math::code_at<code_bits>(group.value, i));
      out[i] = static_cast<scalar_t>(stair.value(stair.level_of_state(state)));
      const int64_t channel = at.channel;
      at.next();
      if (at.channel != channel) stair = steps.of_channel(at.channel);
    }
    store_group(y, g * kGroup, n, packed, out);
  }
}

template <int code_bits, typename opmath_t, typename scalar_t>
cudaError_t launch_staircase_relu_rebuild(const uint8_t* codes, scalar_t* y, const StepSizes<opmath_t>& steps,
                                          int64_t n, cudaStream_t stream) {
  return launch(staircase_relu_rebuild_kernel<code_bits, scalar_t, opmath_t>, blocks_for(n, kGroup), stream,
                codes, y, steps, n, pack_aligned<kGroup>(y));
}

// What backward keeps of the forward pass, element by element or in groups of eight: regions or states, ...
template <int bits, typename opmath_t>
struct FromCodes {
  static constexpr int kBlocksOfHalf = 5;  // on an SM: see kBackwardBlocksAtOnce
  static constexpr int kBlocksOfFloat = bits == 2 ? 5 : 4;
  const uint8_t* codes;
  math::RegionBackward<opmath_t> grads;
  bool exact;  // of states: the derivative in alpha is the level inside

  __device__ unsigned element(int64_t p) const {
    return math::code_at<bits>(codes + p / kGroup * bits, static_cast<int>(p % kGroup));
  }
  __device__ CodeGroup<bits> group(int64_t begin, int64_t, bool) const {
    return load_pack<bits>(codes + begin / kGroup * bits);
  }
  static __device__ unsigned element(const CodeGroup<bits>& group, int i) {
    return math::code_at<bits>(group.value, i);
  }
  __device__ math::StaircaseGrad<opmath_t> operator()(opmath_t grad, unsigned code,
                                                      const math::Staircase<opmath_t>& stair) const {
    auto slopes = grads;
    if constexpr (bits != math::kRegionBits) {
      if (exact) slopes.alpha.inside = static_cast<opmath_t>(code);
    }
    return slopes(grad, region_bits<bits>(code, stair));
  }
};

// ... or x itself.
template <typename Ste, typename scalar_t, typename opmath_t>
struct FromX {
  static constexpr int kBlocksOfHalf = 4;
  static constexpr int kBlocksOfFloat = 4;
  const scalar_t* x;
  math::ValueBackward<Ste, opmath_t> grads;

  __device__ scalar_t element(int64_t p) const { return x[p]; }
  __device__ Pack<scalar_t, kGroup> group(int64_t begin, int64_t n, bool packed) const {
    return load_group(x, begin, n, packed);
  }
  static __device__ scalar_t element(const Pack<scalar_t, kGroup>& group, int i) { return group[i]; }
  __device__ math::StaircaseGrad<opmath_t> operator()(opmath_t grad, scalar_t v,
                                                      const math::Staircase<opmath_t>& stair) const {
    return grads(grad, static_cast<opmath_t>(v), stair);
  }
};

// Elements of one channel that a block takes, and rows where channels alternate element by element.
constexpr int64_t kSlice = kThreads * kGroup * 8;
constexpr int kColumns = 32;
constexpr int kRows = kThreads / kColumns;
constexpr int64_t kSliceRows = kRows * 32;

// Whether the channels alternate from one element to the next, as in channels-last memory.
inline bool is_columns(const math::ChannelView& view) { return view.channels > 1 && view.inner == 1; }

// Partial sums of alpha's gradient for each channel.
inline int64_t alpha_slices(const math::ChannelView& view, int64_t n) {
  const int64_t slice = is_columns(view) ? kSliceRows : kSlice;
  return (n / view.channels + slice - 1) / slice;
}

// Blocks of the two kernels below on an SM for which the registers suffice.
template <typename Kept, typename scalar_t>
constexpr int kBackwardBlocksAtOnce = sizeof(scalar_t) == 8   ? 2
                                      : sizeof(scalar_t) == 4 ? Kept::kBlocksOfFloat
                                                              : Kept::kBlocksOfHalf;
template <typename opmath_t>
constexpr int kColumnsBlocksAtOnce = sizeof(opmath_t) == 8 ? 4 : 5;

// Blocks of a channel each, in slices of its elements: grad_x, and one partial sum of alpha's gradient per
// block. With `grouped`, eight elements that begin at a multiple of eight always belong to one channel.
template <typename Kept, typename scalar_t, typename opmath_t>
__global__ void __launch_bounds__(kThreads, kBackwardBlocksAtOnce<Kept, scalar_t>)
    staircase_relu_backward_kernel(const scalar_t* __restrict__ grad, Kept kept,
                                   scalar_t* __restrict__ grad_x, double* __restrict__ partial,
                                   StepSizes<opmath_t> steps, int64_t n, int64_t slices, bool grouped,
                                   bool packed) {
  const int64_t channel = blockIdx.x / slices;
  const int64_t first = blockIdx.x % slices * kSlice;
  const int64_t per_channel = n / steps.view.channels;
  const int64_t last = first + kSlice < per_channel ? first + kSlice : per_channel;
  const auto stair = steps.of_channel(channel);
  opmath_t sum = 0;
  for (int64_t j = first + int64_t{threadIdx.x} * kGroup; j < last; j += kThreads * kGroup) {
    if (grouped) {
      const int64_t begin = steps.view.position(channel, j);
      const auto g = load_group(grad, begin, n, packed);
      const auto group = kept.group(begin, n, packed);
      Pack<scalar_t, kGroup> out;
      TORCHQAT_UNROLL
      for (int i = 0; i < kGroup; ++i) {
        const auto d = kept(static_cast<opmath_t>(g[i]), Kept::element(group, i), stair);
        out[i] = static_cast<scalar_t>(d.x);
        sum += begin + i < n ? d.alpha : opmath_t(0);
      }
      store_group(grad_x, begin, n, packed, out);
      continue;
    }
    TORCHQAT_UNROLL_TWICE
    for (int64_t e = j; e < last && e < j + kGroup; ++e) {
      const int64_t p = steps.view.position(channel, e);
      const auto d = kept(static_cast<opmath_t>(grad[p]), kept.element(p), stair);
      grad_x[p] = static_cast<scalar_t>(d.x);
      sum += d.alpha;
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = static_cast<double>(sum);
}

// The same where channels alternate element by element: a block takes 32 neighboring channels of a slice of
// rows.
template <typename Kept, typename scalar_t, typename opmath_t>
__global__ void __launch_bounds__(kThreads, kColumnsBlocksAtOnce<opmath_t>)
    staircase_relu_backward_columns_kernel(const scalar_t* __restrict__ grad, Kept kept,
                                           scalar_t* __restrict__ grad_x, double* __restrict__ partial,
                                           StepSizes<opmath_t> steps, int64_t n, int64_t slices) {
  __shared__ opmath_t sums[kRows][kColumns];
  const int column = threadIdx.x % kColumns;
  const int row = threadIdx.x / kColumns;
  const int64_t channels = steps.view.channels;
  const int64_t channel = blockIdx.x / slices * kColumns + column;
  const int64_t slice = blockIdx.x % slices;
  const int64_t rows = n / channels;
  const int64_t last = (slice + 1) * kSliceRows < rows ? (slice + 1) * kSliceRows : rows;
  opmath_t sum = 0;
  if (channel < channels) {
    const auto stair = steps.of_channel(channel);
    for (int64_t r = slice * kSliceRows + row; r < last; r += kRows) {
      const int64_t p = r * channels + channel;
      const auto d = kept(static_cast<opmath_t>(grad[p]), kept.element(p), stair);
      grad_x[p] = static_cast<scalar_t>(d.x);
      sum += d.alpha;
    }
  }
  sums[row][column] = sum;
  __syncthreads();
  if (row == 0 && channel < channels) {
    double total = 0;
    for (int k = 0; k < kRows; ++k) total += static_cast<double>(sums[k][column]);
    partial[channel * slices + slice] = total;
  }
}

// A block adds the partial sums of one channel, in the order of their slots.
template <typename sum_t>
__global__ void __launch_bounds__(kThreads)
    alpha_grad_kernel(const sum_t* __restrict__ partial, int64_t slices, sum_t* __restrict__ grad_alpha) {
  const sum_t sum = sum_slots(partial + blockIdx.x * slices, slices);
  if (threadIdx.x == 0) grad_alpha[blockIdx.x] = sum;
}

// grad_x and grad_alpha (one per channel). `partial` holds channels * alpha_slices doubles.
template <typename opmath_t, typename Kept, typename scalar_t>
cudaError_t launch_staircase_relu_backward(const scalar_t* grad, const Kept& kept, scalar_t* grad_x,
                                           double* grad_alpha, double* partial,
                                           const StepSizes<opmath_t>& steps, int64_t n, cudaStream_t stream) {
  const auto& view = steps.view;
  const int64_t slices = alpha_slices(view, n);
  cudaError_t error = cudaSuccess;
  if (is_columns(view)) {
    const int64_t blocks = (view.channels + kColumns - 1) / kColumns * slices;
    error = launch(staircase_relu_backward_columns_kernel<Kept, scalar_t, opmath_t>,
                   static_cast<unsigned>(blocks), stream, grad, kept, grad_x, partial, steps, n, slices);
  } else {
    const bool grouped = view.channels == 1 || view.inner % kGroup == 0;
    bool packed = pack_aligned<kGroup>(grad, grad_x);
    if constexpr (requires { kept.x; }) packed = packed && pack_aligned<kGroup>(kept.x);
    error = launch(staircase_relu_backward_kernel<Kept, scalar_t, opmath_t>,
                   static_cast<unsigned>(view.channels * slices), stream, grad, kept, grad_x, partial, steps,
                   n, slices, grouped, packed);
  }
  if (error != cudaSuccess) return error;
  return launch(alpha_grad_kernel<double>, static_cast<unsigned>(view.channels), stream, partial, slices,
                grad_alpha);
}

}  // namespace torchqat::cuda
