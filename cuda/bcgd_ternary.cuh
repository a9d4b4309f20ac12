#pragma once

#include "bcgd_batch.cuh"
#include "bcgd_ternary_narrowing.cuh"

// The search of bcgd_ternary_bins.cuh: a scale of few elements is one block's from beginning to end; for the
// large ones the first round is made level by level by many blocks, and one block goes on where that was not
// enough.
namespace torchqat::cuda {

// The search for the large scales, in device memory.
template <typename T>
struct LargeTernary {
  TernaryBins<T>* bins;
  TernaryState<T>* states;
};

template <typename Batch>
__global__ void __launch_bounds__(kThreads)
    bcgd_ternary_start_kernel(const __grid_constant__ Batch batch,
                              LargeTernary<typename Batch::Opmath> large) {
  if (batch.is_skipped()) return;
  large.bins[blockIdx.x].clear();
  if (threadIdx.x == 0) large.states[blockIdx.x].start();
}

// Blocks on an SM for which the registers suffice. Histograms of double, of 40 KB, let in hardly more.
template <typename T>
constexpr int kCountBlocksAtOnce = sizeof(T) == 8 ? 4 : 6;
constexpr int kScaleBlocksAtOnce = 3;

template <typename Batch>
__global__ void __launch_bounds__(kThreads, kCountBlocksAtOnce<typename Batch::Opmath>)
    bcgd_ternary_count_kernel(const __grid_constant__ Batch batch, LargeTernary<typename Batch::Opmath> large,
                              int level) {
  using T = typename Batch::Opmath;
  if (batch.is_skipped()) return;
  __shared__ TernaryBins<T> bins;
  __shared__ TernaryState<T> state;
  const auto s = slice_of_block(batch, batch.large_slices, batch.large_scales, kLargeSliceElements);
  const auto& t = batch.tensors[s.tensor];
  if (threadIdx.x == 0) state = large.states[s.scale];
  bins.clear();
  __syncthreads();
  if (state.windows == 0) return;
  for_each_latent(t, s, [&](T y) { bins.add(state, y, level); });
  __syncthreads();
  large.bins[s.scale].add(bins);
}

template <typename Batch>
__global__ void __launch_bounds__(kThreads)
    bcgd_ternary_narrow_kernel(const __grid_constant__ Batch batch,
                               LargeTernary<typename Batch::Opmath> large, int level) {
  using T = typename Batch::Opmath;
  if (batch.is_skipped()) return;
  __shared__ typename Narrowing<T>::Storage storage;
  __shared__ TernaryState<T> state;
  if (threadIdx.x == 0) state = large.states[blockIdx.x];
  __syncthreads();
  if (state.windows == 0) return;
  auto& bins = large.bins[blockIdx.x];
  Narrowing<T>(storage, bins, state, level).run();
  bins.clear();
  if (threadIdx.x == 0) large.states[blockIdx.x] = state;
}

// One block per scale. The scale that is there is the mean of |y|: where that is NaN it stays.
template <typename Batch>
__global__ void __launch_bounds__(kThreads, kScaleBlocksAtOnce)
    bcgd_ternary_scale_kernel(const __grid_constant__ Batch batch,
                              LargeTernary<typename Batch::Opmath> large) {
  using T = typename Batch::Opmath;
  if (batch.is_skipped()) return;
  __shared__ typename Narrowing<T>::Storage storage;
  __shared__ TernaryBins<T> bins;
  __shared__ TernaryState<T> state;
  SliceOfTensor s;
  s.tensor = batch.scales.tensor_of(blockIdx.x, batch.count);
  const auto& t = batch.tensors[s.tensor];
  s.channel = blockIdx.x - batch.scales.first[s.tensor];
  s.begin = 0;
  s.end = t.per_scale;
  if (s.end == 0 || t.scale[s.channel] != t.scale[s.channel]) return;
  const bool is_large = Batch::is_large(t.per_scale);
  if (threadIdx.x == 0) {
    if (is_large) {
      state = large.states[batch.large_scales.first[s.tensor] + s.channel];
    } else {
      state.start();
    }
  }
  __syncthreads();
  bool done = is_large && state.skipped == 0;
  __syncthreads();
  for (int round = is_large; !done; ++round) {
    if (threadIdx.x == 0 && round > 0) state.restart(state.skipped);
    __syncthreads();
    for (int level = 0; level < ternary_levels<T>() && state.windows > 0; ++level) {
      bins.clear();
      __syncthreads();
      for_each_latent(t, s, [&](T y) { bins.add(state, y, level); });
      __syncthreads();
      Narrowing<T>(storage, bins, state, level).run();
    }
    done = state.skipped == 0;
    __syncthreads();
  }
  if (threadIdx.x == 0) t.scale[s.channel] = static_cast<T>(math::WeightFit(state.best).scale());
}

template <typename Batch>
cudaError_t launch_ternary(const Batch& batch, const LargeTernary<typename Batch::Opmath>& large,
                           cudaStream_t stream) {
  auto error = cudaSuccess;
  if (const unsigned scales = batch.large_scale_count(); scales > 0) {
    const unsigned slices = batch.large_slices.first[batch.count];
    error = launch(bcgd_ternary_start_kernel<Batch>, scales, stream, batch, large);
    for (int level = 0; level < ternary_levels<typename Batch::Opmath>() && error == cudaSuccess; ++level) {
      error = launch(bcgd_ternary_count_kernel<Batch>, slices, stream, batch, large, level);
      if (error != cudaSuccess) return error;
      error = launch(bcgd_ternary_narrow_kernel<Batch>, scales, stream, batch, large, level);
    }
  }
  if (error != cudaSuccess) return error;
  return launch(bcgd_ternary_scale_kernel<Batch>, batch.scale_count(), stream, batch, large);
}

}  // namespace torchqat::cuda
