#pragma once

#include <type_traits>

#include "bcgd_batch.cuh"
#include "bcgd_ternary.cuh"

// Kernels of bcgd_step_ and their launches: a fixed number for each batch of tensors. One kernel makes y and
// adds up what the scales need, one block per scale adds the sums of its slices in their order, one kernel
// writes w.
namespace torchqat::cuda {

// What the kernels of one batch leave for one another.
template <typename opmath_t>
struct StepScratch {
  math::StepSums<math::kWarmSteps>* sums;  // of each slice
  opmath_t* levels_at;                     // of each scale: what gives w its levels
  LargeTernary<opmath_t> ternary;
};

template <int N, typename Batch>
__global__ void __launch_bounds__(kThreads)
    bcgd_update_kernel(const __grid_constant__ Batch batch, math::StepSums<N>* sums) {
  using T = typename Batch::Opmath;
  using Level = std::conditional_t<N == 1, math::TopLevel<T>, math::WarmLevel<T>>;
  if (batch.is_skipped()) return;
  const auto s = slice_of_block(batch, batch.slices, batch.scales, kSliceElements);
  const auto& t = batch.tensors[s.tensor];
  const auto rule = batch.rule_here();
  const bool first = t.steps && *t.steps == 0;
  Level levels[N];
  if constexpr (N > 1) {
    const T before = s.begin < s.end ? t.scale[s.channel] : T(0);
    for (int i = 0; i < N; ++i) levels[i] = Level(static_cast<T>(before * math::warm_share(i)), batch.bits);
  }
  math::StepSums<N> own;
  for_each_pack<4>(t, s, [&](int64_t p, auto n) {
    const auto w = load_pack<n()>(t.w + p);
    const auto g = load_pack<n()>(t.g + p);
    const auto before = load_pack<n()>(t.y + p);
    Pack<T, n()> y;
    const auto make = [&](auto&& rule_of) {
      TORCHQAT_UNROLL
      for (int i = 0; i < n(); ++i) {
        y[i] = rule_of(i, before[i], static_cast<T>(w[i]), static_cast<T>(g[i]));
        own.add(std::abs(y[i]), levels);
      }
    };
    if (t.buffer) {
      const auto old = load_pack<n()>(t.buffer + p);
      Pack<T, n()> buffer;
      make([&](int i, T y_before, T from, T grad) {
        T b = old[i];
        const T made = rule(y_before, from, grad, b, first);
        buffer[i] = b;
        return made;
      });
      store_pack(t.buffer + p, buffer);
    } else {
      make([&](int, T y_before, T from, T grad) { return rule(y_before, from, grad); });
    }
    store_pack(t.y + p, y);
  });
  own = block_sum(own);
  if (threadIdx.x == 0) sums[blockIdx.x] = own;
}

// One block per scale. `refit`: the sums are those of the levels that w gets.
template <int N, typename Batch>
__global__ void __launch_bounds__(kThreads)
    bcgd_fit_kernel(const __grid_constant__ Batch batch, const math::StepSums<N>* sums,
                    typename Batch::Opmath* levels_at, bool refit) {
  if (batch.is_skipped()) return;
  const int tensor = batch.scales.tensor_of(blockIdx.x, batch.count);
  const auto& t = batch.tensors[tensor];
  const unsigned channel = blockIdx.x - batch.scales.first[tensor];
  const auto slices = static_cast<unsigned>(slices_for(t.per_scale, kSliceElements));
  const auto total = sum_slots(sums + batch.slices.first[tensor] + channel * slices, slices);
  if (threadIdx.x != 0) return;
  const double scale = refit ? total.scale() : math::scale_after_update(total, batch.projection, batch.bits);
  if (t.scale) t.scale[channel] = static_cast<typename Batch::Opmath>(scale);
  if (refit) return;
  levels_at[blockIdx.x] = static_cast<typename Batch::Opmath>(scale);
  if (t.steps && channel == 0) *t.steps += 1;
}

// Calls f with the rule that gives the new w of one scale their levels.
template <typename Batch, typename F>
__device__ __forceinline__ void with_level(const Batch& batch, typename Batch::Opmath at, F&& f) {
  using T = typename Batch::Opmath;
  if (batch.projection == math::Projection::mean) {
    f(math::TopLevel<T>());
  } else if (batch.projection == math::Projection::twn) {
    f(math::KeptLevel<T>{at});
  } else {
    f(math::NearestLevel<T>(at, batch.bits));
  }
}

template <typename Batch>
__global__ void __launch_bounds__(kThreads)
    bcgd_sum_kernel(const __grid_constant__ Batch batch, const typename Batch::Opmath* levels_at,
                    math::StepSums<1>* sums) {
  if (batch.is_skipped()) return;
  const auto s = slice_of_block(batch, batch.slices, batch.scales, kSliceElements);
  const auto& t = batch.tensors[s.tensor];
  using T = typename Batch::Opmath;
  math::StepSums<1> own;
  with_level(batch, levels_at[s.scale], [&]<typename Level>(Level level) {
    const Level levels[1] = {level};
    for_each_latent(t, s, [&](T y) { own.add(std::abs(y), levels); });
  });
  own = block_sum(own);
  if (threadIdx.x == 0) sums[blockIdx.x] = own;
}

template <typename Batch>
__global__ void __launch_bounds__(kThreads)
    bcgd_write_kernel(const __grid_constant__ Batch batch, const typename Batch::Opmath* levels_at) {
  using T = typename Batch::Opmath;
  if (batch.is_skipped()) return;
  const auto s = slice_of_block(batch, batch.slices, batch.scales, kSliceElements);
  const auto& t = batch.tensors[s.tensor];
  if (s.begin == s.end) return;
  const T scale = t.scale[s.channel];
  with_level(batch, math::refits(batch.projection) ? levels_at[s.scale] : scale, [&](auto level) {
    for_each_pack<8>(t, s, [&](int64_t p, auto n) {
      using W = std::remove_pointer_t<decltype(t.w)>;
      const auto y = load_pack<n()>(t.y + p);
      Pack<W, n()> w;
      TORCHQAT_UNROLL
      for (int i = 0; i < n(); ++i) {
        w[i] = static_cast<W>(scale * math::with_sign_of(y[i], level(std::abs(y[i]))));
      }
      store_pack(t.w + p, w);
    });
  });
}

// The update with the sums for N assignments of levels, and the scales by them.
template <int N, typename Batch>
cudaError_t launch_update(const Batch& batch, void* sums, typename Batch::Opmath* levels_at,
                          cudaStream_t stream) {
  auto* typed = static_cast<math::StepSums<N>*>(sums);
  const auto error = launch(bcgd_update_kernel<N, Batch>, batch.slice_count(), stream, batch, typed);
  if (error != cudaSuccess) return error;
  return launch(bcgd_fit_kernel<N, Batch>, batch.scale_count(), stream, batch, typed, levels_at, false);
}

template <typename Batch>
cudaError_t launch_refit(const Batch& batch, void* sums, typename Batch::Opmath* levels_at,
                         cudaStream_t stream) {
  auto* typed = static_cast<math::StepSums<1>*>(sums);
  const auto error = launch(bcgd_sum_kernel<Batch>, batch.slice_count(), stream, batch, levels_at, typed);
  if (error != cudaSuccess) return error;
  return launch(bcgd_fit_kernel<1, Batch>, batch.scale_count(), stream, batch, typed, levels_at, true);
}

template <typename Batch>
cudaError_t launch_bcgd_step(const Batch& batch, const StepScratch<typename Batch::Opmath>& scratch,
                             cudaStream_t stream) {
  if (batch.scale_count() == 0) return cudaSuccess;
  const bool warm = batch.projection == math::Projection::warm;
  auto error = warm ? launch_update<math::kWarmSteps>(batch, scratch.sums, scratch.levels_at, stream)
                    : launch_update<1>(batch, scratch.sums, scratch.levels_at, stream);
  if (error == cudaSuccess && batch.projection == math::Projection::ternary) {
    error = launch_ternary(batch, scratch.ternary, stream);
  }
  if (error == cudaSuccess && math::refits(batch.projection)) {
    error = launch_refit(batch, scratch.sums, scratch.levels_at, stream);
  }
  if (error != cudaSuccess) return error;
  return launch(bcgd_write_kernel<Batch>, batch.slice_count(), stream, batch, scratch.levels_at);
}

}  // namespace torchqat::cuda
