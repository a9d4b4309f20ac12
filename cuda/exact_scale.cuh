#pragma once

#include "quantize_weight.cuh"

// The kernels around the sort that finds the least-squares scale: the magnitudes to sort, channel after
// channel; their prefix sums; and the search, a block for each channel.
namespace torchqat::cuda {

// Magnitudes whose prefix sums a block makes; each thread takes kRun consecutive ones.
constexpr int kRun = 8;
constexpr int64_t kChunk = kRun * kThreads;

constexpr int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }

template <typename scalar_t, typename opmath_t>
__global__ void __launch_bounds__(kThreads)
    magnitudes_kernel(const scalar_t* __restrict__ weight, opmath_t* __restrict__ magnitudes,
                      ChannelSlices slices) {
  for (int64_t i = grid_thread(); i < slices.weights(); i += grid_threads()) {
    const int64_t p = slices.view.position(i / slices.size, i % slices.size);
    magnitudes[i] = std::abs(static_cast<opmath_t>(weight[p]));
  }
}

// The sum of the values that the threads before this one brought, and of all. All threads must come here.
struct BlockPrefix {
  double before, all;
};
__device__ __forceinline__ BlockPrefix block_prefix(double value) {
  __shared__ double sums[2][kThreads];
  const int thread = threadIdx.x;
  __syncthreads();  // the prefix sum before this one may still be reading
  int now = 0;
  sums[now][thread] = value;
  __syncthreads();
  for (int offset = 1; offset < kThreads; offset *= 2) {
    const double sum = sums[now][thread] + (thread >= offset ? sums[now][thread - offset] : 0.0);
    now = 1 - now;
    sums[now][thread] = sum;
    __syncthreads();
  }
  return {thread == 0 ? 0.0 : sums[now][thread - 1], sums[now][kThreads - 1]};
}

// sums[i] = the sum of a channel's magnitudes from the beginning of i's chunk up to i, and chunk_sums = that
// of each whole chunk.
template <typename opmath_t>
__global__ void __launch_bounds__(kThreads)
    prefix_in_chunks_kernel(const opmath_t* __restrict__ magnitudes, double* __restrict__ sums,
                            double* __restrict__ chunk_sums, int64_t channels, int64_t size) {
  const int64_t per_channel = chunks_of(size);
  for (int64_t chunk = blockIdx.x; chunk < channels * per_channel; chunk += gridDim.x) {
    const int64_t first = chunk / per_channel * size;
    const int64_t begin = chunk % per_channel * kChunk + int64_t{threadIdx.x} * kRun;
    const int64_t end = std::min(size, begin + kRun);
    double run = 0;
    for (int64_t j = begin; j < end; ++j) run += static_cast<double>(magnitudes[first + j]);
    const BlockPrefix prefix = block_prefix(run);
    double sum = prefix.before;
    for (int64_t j = begin; j < end; ++j) {
      sum += static_cast<double>(magnitudes[first + j]);
      sums[first + j] = sum;
    }
    if (threadIdx.x == 0) chunk_sums[chunk] = prefix.all;
  }
}

// chunk_sums become the sums of all chunks of the channel before. A block per channel.
template <typename sum_t>
__global__ void __launch_bounds__(kThreads)
    prefix_of_chunks_kernel(sum_t* __restrict__ chunk_sums, int64_t channels, int64_t size) {
  const int64_t chunks = chunks_of(size);
  for (int64_t channel = blockIdx.x; channel < channels; channel += gridDim.x) {
    sum_t* const sums = chunk_sums + channel * chunks;
    sum_t before = 0;
    for (int64_t begin = 0; begin < chunks; begin += kThreads) {
      const int64_t i = begin + threadIdx.x;
      const BlockPrefix prefix = block_prefix(i < chunks ? sums[i] : 0.0);
      if (i < chunks) sums[i] = before + prefix.before;
      before += prefix.all;
    }
  }
}

template <typename opmath_t>
cudaError_t launch_prefix_sums(const opmath_t* magnitudes, double* sums, double* chunk_sums, int64_t channels,
                               int64_t size, cudaStream_t stream) {
  const auto error = launch(prefix_in_chunks_kernel<opmath_t>, blocks_of(channels * chunks_of(size)), stream,
                            magnitudes, sums, chunk_sums, channels, size);
  if (error != cudaSuccess) return error;
  return launch(prefix_of_chunks_kernel<double>, blocks_of(channels), stream, chunk_sums, channels, size);
}

// The weights of one channel, as math::ExactScaleSearch sees them.
template <typename opmath_t>
struct SortedChannel {
  const opmath_t* magnitudes;
  const double* sums;
  const double* chunks_before;
  int64_t n;

  __device__ int64_t size() const { return n; }
  __device__ double magnitude(int64_t i) const { return magnitudes[i]; }
  TORCHQAT_HD double sum_of_first(int64_t count) const {
    return count == 0 ? 0.0 : chunks_before[(count - 1) / kChunk] + sums[count - 1];
  }
};

// A block, a thread for each level. What the search keeps lies in shared memory: as a local array of each
// thread it would make the driver set hundreds of megabytes aside.
class BlockTeam {
 public:
  static constexpr int kDepth = math::kSearchDepth;
  static constexpr int kLevels = math::weight_top(8);
  static_assert(kLevels <= kThreads);
  struct State {
    double energy, overlap, above, below;
  };
  struct Storage {
    State states[kDepth];
    State joined;
    int64_t counts[kDepth][kLevels];
  };

  __device__ explicit BlockTeam(Storage& storage) : storage_(storage) {}
  __device__ int first_level() const { return static_cast<int>(threadIdx.x) + 1; }
  __device__ int stride() const { return kThreads; }
  __device__ int64_t& count(int slot, int) { return storage_.counts[slot][threadIdx.x]; }

  __device__ math::StepState join(const math::StepState& state) {
    const math::StepState sum = block_sum(state);
    put(storage_.joined, sum);
    return get(storage_.joined);
  }
  __device__ math::StepState state(int slot) const { return get(storage_.states[slot]); }
  __device__ void set_state(int slot, const math::StepState& state) { put(storage_.states[slot], state); }

 private:
  static __device__ math::StepState get(const State& s) { return {{s.energy, s.overlap}, s.above, s.below}; }
  // Thread 0 writes, between barriers: all have read what was there before, and all read what is there now.
  static __device__ void put(State& to, const math::StepState& state) {
    __syncthreads();
    if (threadIdx.x == 0) to = {state.fit.energy, state.fit.overlap, state.above, state.below};
    __syncthreads();
  }

  Storage& storage_;
};

// The least-squares scale of each channel of sorted magnitudes. Where `scale` holds NaN it stays.
template <typename opmath_t>
__global__ void __launch_bounds__(kThreads)
    exact_scale_kernel(const opmath_t* __restrict__ magnitudes, const double* __restrict__ sums,
                       const double* __restrict__ chunks_before, opmath_t* __restrict__ scale,
                       int64_t channels, int64_t size, int top) {
  __shared__ BlockTeam::Storage storage;
  BlockTeam team(storage);
  for (int64_t channel = blockIdx.x; channel < channels; channel += gridDim.x) {
    const opmath_t before = scale[channel];
    if (before != before) continue;
    const SortedChannel<opmath_t> sorted{magnitudes + channel * size, sums + channel * size,
                                         chunks_before + channel * chunks_of(size), size};
    const auto fit = math::ExactScaleSearch(sorted, top, team).best();
    const double zero = fit.overlap - fit.overlap;  // NaN where float64 sums overflow
    __syncthreads();                                // all have read the scale before it changes
    if (threadIdx.x == 0) scale[channel] = static_cast<opmath_t>(fit.scale() + zero);
  }
}

}  // namespace torchqat::cuda
