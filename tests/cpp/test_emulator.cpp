#include <numeric>

#include "kernel_test.h"

// The emulator itself: what is right runs right, and each kind of defect that it is there for is found.
namespace torchqat::cuda::testing {
namespace {

template <typename T>
std::vector<T> ramp(int64_t n) {
  std::vector<T> values(n);
  std::iota(values.begin(), values.end(), T(1));
  return values;
}

// ---- what is right

__global__ void __launch_bounds__(kThreads)
    sum_kernel(const double* __restrict__ x, double* __restrict__ partial, double* __restrict__ sum,
               unsigned* ticket, int64_t n) {
  double mine = 0;
  for (int64_t i = grid_thread(); i < n; i += grid_threads()) mine += x[i];
  mine = block_sum(mine);
  if (threadIdx.x == 0) partial[blockIdx.x] = mine;
  if (!is_last_block(ticket, gridDim.x)) return;
  const double total = sum_slots(partial, gridDim.x);
  if (threadIdx.x == 0) *sum = total;
}

TEST(Emulator, SumsWithATicketThatResetsItself) {
  for (const int64_t n : kSizes) {
    const auto [sums, ticket] = in_every_world([&] {
      Buffer<double> x(ramp<double>(n)), partial(blocks_for(n)), sum(2);
      Buffer<unsigned> ticket(std::vector<unsigned>{0});
      for (int i = 0; i < 2; ++i) {
        expect_success(launch(sum_kernel, blocks_for(n), nullptr, x.data(), partial.data(), sum.data() + i,
                              ticket.data(), n));
      }
      return std::tuple(sum.contents(), ticket.contents());
    });
    EXPECT_EQ(sums, std::vector<double>(2, n * (n + 1) / 2));
    EXPECT_EQ(ticket[0], 0U);
  }
}

}  // namespace
}  // namespace torchqat::cuda::testing
