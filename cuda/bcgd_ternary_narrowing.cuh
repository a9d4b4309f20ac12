#pragma once

#include "bcgd_ternary_bins.cuh"

namespace torchqat::cuda {

// The fit of the higher score; of equal ones that of fewer weights.
struct BetterFit {
  __device__ math::WeightFit operator()(const math::WeightFit& a, const math::WeightFit& b) const {
    const double difference = a.score() - b.score();
    return difference > 0 || (difference == 0 && a.energy <= b.energy) ? a : b;
  }
};

// One level of the search, by one block with a warp for each window: reads the bins of the windows, and puts
// the bins that may hold something better in the place of the windows.
template <typename T>
class Narrowing {
 public:
  struct Storage {
    typename cub::BlockReduce<math::WeightFit, kThreads>::TempStorage best;
    PlainFit totals[kWindows];
    int found[kWindows];
    PlainFit above[kWindows];
    math::Pattern<T> prefix[kWindows];
  };

  __device__ Narrowing(Storage& shared, const TernaryBins<T>& bins, TernaryState<T>& state, int level)
      : shared_(shared),
        bins_(bins),
        state_(state),
        shift_(ternary_shift<T>(level)),
        digits_(ternary_shift<T>(level - 1) - shift_),
        window_(threadIdx.x / 32),
        lane_(threadIdx.x % 32),
        chained_(level == 0) {}

  // All threads of the block must come here, and the state and the bins be complete.
  __device__ void run() {
    const math::WeightFit from = above_own_bins();
    find_best(from);
    const double goal = math::WeightFit(state_.best).score() * (1 + math::kScoreSlack);
    unsigned found = 0;
    walk(from, [&](const math::WeightFit& a, const math::WeightFit& b, math::Pattern<T> lowest, int i) {
      found |= static_cast<unsigned>(may_be_better(a, b, lowest, goal)) << i;
    });
    put_windows(from, found);
  }

 private:
  static constexpr int kPerLane = kWindowBins / 32;

  // Calls f(fit above the bin, fit with the bin, its lowest pattern, i) for this thread's bins that have
  // members, from the highest down, and returns the fit with all of them.
  template <typename F>
  __device__ math::WeightFit walk(math::WeightFit from, F&& f) const {
    if (window_ >= state_.windows) return from;
    for (int i = 0; i < kPerLane; ++i) {
      const int digit = kWindowBins - 1 - (lane_ * kPerLane + i);
      const int bin = window_ * kWindowBins + digit;
      if (bins_.count[bin] == 0) continue;
      const auto lowest = (state_.prefix[window_] << digits_ | static_cast<math::Pattern<T>>(digit))
                          << shift_;
      const auto to = from + bins_.fit(bin, lowest);
      f(from, to, lowest, i);
      from = to;
    }
    return from;
  }

  // All that is above this thread's bins.
  __device__ math::WeightFit above_own_bins() {
    math::WeightFit sum = walk({}, [](auto...) {});
    for (int offset = 1; offset < 32; offset *= 2) {
      const math::WeightFit lower{__shfl_up_sync(~0u, sum.energy, offset),
                                  __shfl_up_sync(~0u, sum.overlap, offset)};
      if (lane_ >= offset) sum = lower + sum;
    }
    if (lane_ == 31) shared_.totals[window_] = sum;
    const math::WeightFit before{__shfl_up_sync(~0u, sum.energy, 1), __shfl_up_sync(~0u, sum.overlap, 1)};
    __syncthreads();
    math::WeightFit above;
    if (!chained_) {
      if (window_ < state_.windows) above = state_.above[window_];
    } else {
      for (int w = 0; w < window_; ++w) above = above + math::WeightFit(shared_.totals[w]);
    }
    return lane_ == 0 ? above : above + before;
  }

  __device__ void find_best(const math::WeightFit& from) {
    math::WeightFit own;
    walk(from, [&](const auto&, const math::WeightFit& to, auto, int) { own = BetterFit()(own, to); });
    own = cub::BlockReduce<math::WeightFit, kThreads>(shared_.best).Reduce(own, BetterFit());
    if (threadIdx.x == 0) state_.best = BetterFit()(state_.best, own);
    __syncthreads();
  }

  // Between the first and the last of a bin's members. One member leaves nothing between, equal ones nothing
  // better.
  __device__ bool may_be_better(const math::WeightFit& from, const math::WeightFit& to,
                                math::Pattern<T> lowest, double goal) const {
    if (shift_ == 0 || to.energy - from.energy < 2 || lowest >= state_.settled) return false;
    const double steep = math::magnitude_of<T>(lowest + ((math::Pattern<T>{1} << shift_) - 1));
    return math::score_bound(from, to, steep, math::magnitude_of<T>(lowest)) > goal;
  }

  // The highest of the bins that were found become the windows. `found` has a bit for each of this thread's.
  __device__ void put_windows(const math::WeightFit& from, unsigned found) {
    int rank = __popc(found);
    for (int offset = 1; offset < 32; offset *= 2) {
      const int lower = __shfl_up_sync(~0u, rank, offset);
      if (lane_ >= offset) rank += lower;
    }
    if (lane_ == 31) shared_.found[window_] = rank;
    rank -= __popc(found);
    __syncthreads();
    int all = 0;
    for (int w = 0; w < kWindows; ++w) {
      if (w < window_) rank += shared_.found[w];
      all += shared_.found[w];
    }
    walk(from, [&](const math::WeightFit& above, const auto&, math::Pattern<T> lowest, int i) {
      if ((found >> i & 1) == 0) return;
      if (rank < kWindows) {
        shared_.above[rank] = above;
        shared_.prefix[rank] = lowest >> shift_;
      }
      if (rank == kWindows - 1 && all > kWindows && lowest > state_.skipped) state_.skipped = lowest;
      ++rank;
    });
    __syncthreads();
    const int windows = all < kWindows ? all : kWindows;
    if (static_cast<int>(threadIdx.x) < windows) {
      state_.above[threadIdx.x] = shared_.above[threadIdx.x];
      state_.prefix[threadIdx.x] = shared_.prefix[threadIdx.x];
    }
    if (threadIdx.x == 0) state_.windows = windows;
    __syncthreads();
  }

  Storage& shared_;
  const TernaryBins<T>& bins_;
  TernaryState<T>& state_;
  const int shift_, digits_, window_, lane_;
  const bool chained_;
};

}  // namespace torchqat::cuda
