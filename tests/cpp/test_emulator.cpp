#include <gtest/gtest-spi.h>
#include <mma.h>

#include <bit>
#include <cstdlib>
#include <numeric>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>

#include "kernel_test.h"

// The emulator itself: what is right runs right, and each kind of defect that it is there to find is found.
namespace torchqat::cuda {

// In the namespace of the kernels, which is where the emulator keeps dynamic shared memory.
__global__ void dynamic_kernel(int* out, int stored) {
  extern __shared__ unsigned char dynamic_shared[];
  int* ints = reinterpret_cast<int*>(dynamic_shared);
  if (threadIdx.x < static_cast<unsigned>(stored)) ints[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = ints[kThreads - 1 - threadIdx.x];
}

namespace testing {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFF;
const char* const kWorldsDiffer = "depends on memory that nobody wrote, or on the order";

template <typename T>
std::vector<T> ramp(int64_t n) {
  std::vector<T> values(n);
  std::iota(values.begin(), values.end(), T(1));
  return values;
}

// Runs a kernel that takes one int* in blocks of kThreads, with n ints to write to.
std::vector<int> ints_of(void (*kernel)(int*), int64_t n, dim3 blocks = 1) {
  Buffer<int> out(n);
  expect_success(launch(kernel, blocks, nullptr, out.data()));
  return out.contents();
}

// What the emulator says about a kernel that it must refuse.
std::string error_of(void (*kernel)(int*)) {
  try {
    ints_of(kernel, kThreads);
  } catch (const emu::Error& error) {
    return error.what();
  }
  return "no error";
}

#define EXPECT_SAYS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

// ------------------------------------------------------------------------------------------- what is right

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

__global__ void block_sum_kernel(const float* x, float* sum) {
  const float total = block_sum(x[threadIdx.x]);
  if (threadIdx.x == 0) *sum = total;
}

// In each warp neighbors first, then neighboring pairs, ..; then the warps one after the other.
float sum_as_cub(std::vector<float> x) {
  float sum = 0;
  for (size_t warp = 0; warp < x.size(); warp += 32) {
    float* w = &x[warp];
    for (int n = 16; n > 0; n /= 2) {
      for (int i = 0; i < n; ++i) w[i] = w[2 * i] + w[2 * i + 1];
    }
    sum = warp == 0 ? w[0] : sum + w[0];
  }
  return sum;
}

TEST(Emulator, AddsInTheOrderOfCub) {
  std::vector<float> x(kThreads);
  for (int i = 0; i < kThreads; ++i) x[i] = std::exp2(static_cast<float>(i * 37 % 41)) / 3;
  const auto sum = in_every_world([&] {
    Buffer<float> in(x), sum(1);
    expect_success(launch(block_sum_kernel, 1, nullptr, in.data(), sum.data()));
    return sum.contents();
  });
  EXPECT_EQ(sum[0], sum_as_cub(x));
  EXPECT_NE(sum[0], std::accumulate(x.begin(), x.end(), 0.0F)) << "the numbers chosen do not tell the order";
}

__global__ void shuffle_kernel(int* out) {
  const int i = threadIdx.x;
  out[4 * i] = __shfl_down_sync(kAllLanes, i, 3);
  out[4 * i + 1] = __shfl_up_sync(kAllLanes, i, 1, 8);
  out[4 * i + 2] = __shfl_xor_sync(kAllLanes, i, 16);
  out[4 * i + 3] = static_cast<int>(2 * __shfl_sync(kAllLanes, 1.5 * i, 5, 16));
}

TEST(Emulator, ShufflesWithinWarpsAndSegments) {
  const auto out = in_every_world([] { return ints_of(shuffle_kernel, 4 * kThreads); });
  for (int i = 0; i < kThreads; ++i) {
    EXPECT_EQ(out[4 * i], i % 32 + 3 < 32 ? i + 3 : i);
    EXPECT_EQ(out[4 * i + 1], i % 8 == 0 ? i : i - 1);
    EXPECT_EQ(out[4 * i + 2], i ^ 16);
    EXPECT_EQ(out[4 * i + 3], 3 * (i / 16 * 16 + 5));
  }
}

__global__ void ballot_kernel(int* out) {
  const int i = threadIdx.x;
  const unsigned odd = 0xAAAAAAAA;
  __syncwarp();
  out[i] = __popc(__ballot_sync(kAllLanes, i % 3 == 0));
  if (i % 2 == 1)
    out[i] = __all_sync(odd, i % 2 == 1) && !__any_sync(odd, i % 2 == 0) && __ballot_sync(odd, 1) == odd;
}

// A block of a warp and a half.
__global__ void half_warp_kernel(int* out) {
  const unsigned mask = threadIdx.x < 32 ? kAllLanes : 0xFFFF;
  const int next = __shfl_down_sync(mask, static_cast<int>(threadIdx.x), 1, 16);
  __syncwarp(mask);
  out[threadIdx.x] = next;
}

TEST(Emulator, HasBlocksThatAreNoWholeNumberOfWarps) {
  const auto out = in_every_world([] {
    Buffer<int> out(48);
    cudaLaunchConfig_t config{1, 48, 0, nullptr, nullptr, 0};
    expect_success(cudaLaunchKernelEx(&config, half_warp_kernel, out.data()));
    return out.contents();
  });
  for (int i = 0; i < 48; ++i) EXPECT_EQ(out[i], i % 16 == 15 ? i : i + 1);
}

TEST(Emulator, VotesAmongTheLanesOfTheMask) {
  const auto out = in_every_world([] { return ints_of(ballot_kernel, kThreads); });
  for (int i = 0; i < kThreads; ++i) {
    int multiples = 0;
    for (int j = i / 32 * 32; j < i / 32 * 32 + 32; ++j) multiples += j % 3 == 0;
    EXPECT_EQ(out[i], i % 2 == 1 ? 1 : multiples) << i;
  }
}

struct Large {
  int values[8000];
};
__global__ void large_kernel(const __grid_constant__ Large large, int* out) {
  out[grid_thread()] = large.values[grid_thread()];
}

TEST(Emulator, PassesLargeArguments) {
  Large large;
  std::iota(large.values, large.values + 8000, 0);
  Buffer<int> out(7936);
  expect_success(launch(large_kernel, 31, nullptr, large, out.data()));
  EXPECT_EQ(out.contents(), std::vector<int>(large.values, large.values + 7936));
}

__global__ void index_kernel(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  out[block * 24 + thread] = static_cast<int>(block * 24 + thread);
}

TEST(Emulator, NumbersThreadsAndBlocksInThreeDimensions) {
  const auto out = in_every_world([] {
    Buffer<int> out(24 * 30);
    cudaLaunchConfig_t config{{5, 3, 2}, {2, 3, 4}, 0, nullptr, nullptr, 0};
    emu::launches.clear();
    expect_success(cudaLaunchKernelEx(&config, index_kernel, out.data()));
    EXPECT_EQ(emu::launches.size(), 1U);
    return out.contents();
  });
  for (int i = 0; i < 24 * 30; ++i) EXPECT_EQ(out[i], i);
}

std::vector<int> dynamic_ints(int bytes, int stored = kThreads) {
  Buffer<int> out(kThreads);
  cudaLaunchConfig_t config{1, kThreads, static_cast<size_t>(bytes), nullptr, nullptr, 0};
  expect_success(cudaLaunchKernelEx(&config, dynamic_kernel, out.data(), stored));
  return out.contents();
}

__global__ void predicate_kernel(int* out) {
  const int i = threadIdx.x;
  out[6 * i] = __syncthreads_count(i % 3 == 0 ? 7 : 0);
  out[6 * i + 1] = __syncthreads_and(i < kThreads) != 0;
  out[6 * i + 2] = __syncthreads_and(i != 77) != 0;
  out[6 * i + 3] = __syncthreads_or(i == 77) != 0;
  out[6 * i + 4] = __syncthreads_or(i == kThreads) != 0;
  __syncthreads();
  out[6 * i + 5] = __syncthreads_count(0);
}

TEST(Emulator, CountsThreadsAtBarriers) {
  const auto out = in_every_world([] { return ints_of(predicate_kernel, 6 * kThreads); });
  for (int i = 0; i < kThreads; ++i) {
    EXPECT_EQ(std::vector<int>(&out[6 * i], &out[6 * i] + 6),
              (std::vector<int>{(kThreads + 2) / 3, 1, 0, 1, 0, 0}));
  }
}

__global__ void order_kernel(int* out, unsigned* next) {
  __shared__ unsigned of_block;
  if (threadIdx.x == 0) of_block = 0;
  __syncthreads();
  const unsigned i = atomicAdd(&of_block, 1u);
  if (i == 0) out[atomicAdd(next, 1u)] = static_cast<int>(blockIdx.x);
  if (blockIdx.x == 0) out[gridDim.x + i] = static_cast<int>(threadIdx.x);
}

// The blocks of a grid, then the threads of its first block, as they come.
std::vector<int> order_in(const emu::World& world) {
  const InWorld inside(world);
  Buffer<int> out(40 + kThreads);
  Buffer<unsigned> next(std::vector<unsigned>{0});
  expect_success(launch(order_kernel, 40, nullptr, out.data(), next.data()));
  return out.contents();
}

TEST(Emulator, ShufflesBlocksAndThreadsBySeed) {
  std::set<std::vector<int>> blocks, threads;
  for (const unsigned seed : {1, 2, 3, 4}) {
    const auto order = order_in({0, emu::Order::shuffled, seed});
    EXPECT_EQ(order, order_in({0xFF, emu::Order::shuffled, seed}));
    blocks.insert(std::vector<int>(order.begin(), order.begin() + 40));
    threads.insert(std::vector<int>(order.begin() + 40, order.end()));
  }
  EXPECT_EQ(blocks.size(), 4U);
  EXPECT_EQ(threads.size(), 4U);
}

// Sets TORCHQAT_EMU_SEED; its destructor puts back what was there.
struct SeedVariable {
  explicit SeedVariable(const char* text) { setenv("TORCHQAT_EMU_SEED", text, 1); }
  ~SeedVariable() {
    before ? setenv("TORCHQAT_EMU_SEED", before->c_str(), 1) : unsetenv("TORCHQAT_EMU_SEED");
  }

  static std::optional<std::string> now() {
    const char* const text = std::getenv("TORCHQAT_EMU_SEED");
    return text == nullptr ? std::nullopt : std::optional<std::string>(text);
  }
  const std::optional<std::string> before = now();
};

TEST(Emulator, RefusesASeedThatIsNoNumber) {
  for (const char* text : {"", "abc", "-1", "7x", "99999999999999999999"}) {
    const SeedVariable variable(text);
    std::string said;
    try {
      worlds();
    } catch (const std::invalid_argument& error) {
      said = error.what();
    }
    EXPECT_EQ(said,
              "TORCHQAT_EMU_SEED must be a number from 0 to 4294967295, got '" + std::string(text) + "'");
  }
}

TEST(Emulator, TakesTheSeedFromTheEnvironment) {
  const SeedVariable variable("41");
  const auto all = worlds();
  std::vector<unsigned> seeds;
  for (const auto& world : all) {
    if (world.order == emu::Order::shuffled) seeds.push_back(world.seed);
  }
  EXPECT_EQ(seeds, (std::vector<unsigned>{41, 42}));
  EXPECT_EQ(emu::name_of({0x0A, emu::Order::shuffled, 41}), "poison 0x0A, shuffled (TORCHQAT_EMU_SEED=41)");
}

TEST(Emulator, HasDynamicSharedMemory) {
  const auto out = in_every_world([] { return dynamic_ints(4 * kThreads); });
  for (int i = 0; i < kThreads; ++i) EXPECT_EQ(out[i], kThreads - 1 - i);
  EXPECT_DEATH(dynamic_ints(4 * kThreads - 4), "use-after-poison");
  EXPECT_NONFATAL_FAILURE(in_every_world([] { return dynamic_ints(4 * kThreads, 9); }), kWorldsDiffer);
}

__global__ void atomic_kernel(int* out) {
  const int i = threadIdx.x;
  if (i == 0) out[0] = out[1] = out[2] = out[3] = 0;
  __syncthreads();
  atomicAdd(&out[0], i);
  atomicMax(&out[1], i);
  atomicMin(&out[2], -i);
  atomicOr(&out[3], 1 << i % 16);
}

TEST(Emulator, HasIntegerAtomics) {
  EXPECT_EQ(in_every_world([] { return ints_of(atomic_kernel, 4); }),
            (std::vector<int>{kThreads * (kThreads - 1) / 2, kThreads - 1, 1 - kThreads, 0xFFFF}));
}

template <typename T>
constexpr bool kHasAtomicAdd = requires(T* p) {
  atomicAdd(p, T(1));
};
static_assert(kHasAtomicAdd<unsigned long long> && !kHasAtomicAdd<float> && !kHasAtomicAdd<double>,
              "a sum of floats must not depend on the order of threads");

namespace wmma = nvcuda::wmma;
template <typename T, typename Layout>
using Left = wmma::fragment<wmma::matrix_a, 16, 16, 16, T, Layout>;
template <typename T, typename Layout>
using Right = wmma::fragment<wmma::matrix_b, 16, 16, 16, T, Layout>;
using Sum = wmma::fragment<wmma::accumulator, 16, 16, 16, float>;

// A block of one warp: out = a b + out, for matrices of 16 x 16.
template <typename T, typename LayoutA, typename LayoutB>
__global__ void multiply_kernel(const T* a, const T* b, float* out, unsigned lda, unsigned ldb,
                                wmma::layout_t layout) {
  Left<T, LayoutA> left;
  Right<T, LayoutB> right;
  Sum sum, zero;
  wmma::load_matrix_sync(left, a, lda);
  wmma::load_matrix_sync(right, b, ldb);
  wmma::load_matrix_sync(sum, out, 20, layout);
  wmma::fill_fragment(zero, 0.0F);
  wmma::mma_sync(zero, left, right, zero);
  for (int i = 0; i < sum.num_elements; ++i) sum.x[i] += zero.x[i];
  wmma::store_matrix_sync(out, sum, 20, layout);
}

template <typename Kernel, typename... Args>
cudaError_t launch_warp(Kernel kernel, Args... args) {
  cudaLaunchConfig_t config{1, 32, 0, nullptr, nullptr, 0};
  return cudaLaunchKernelEx(&config, kernel, args...);
}

template <typename T, typename LayoutA, typename LayoutB>
void expect_product(wmma::layout_t layout) {
  constexpr int kLda = 24, kLdb = 16, kLdc = 20;
  std::vector<T> a(15 * kLda + 16), b(15 * kLdb + 16);
  std::vector<float> c(15 * kLdc + 16);
  for (size_t i = 0; i < a.size(); ++i) a[i] = static_cast<T>(static_cast<float>(i * 7 % 13) - 6);
  for (size_t i = 0; i < b.size(); ++i) b[i] = static_cast<T>(static_cast<float>(i * 5 % 11) - 5);
  for (size_t i = 0; i < c.size(); ++i) c[i] = static_cast<float>(i * 3 % 17);
  const auto out = in_every_world([&] {
    Buffer<T> left(a), right(b);
    Buffer<float> out(c);
    expect_success(launch_warp(multiply_kernel<T, LayoutA, LayoutB>, left.data(), right.data(), out.data(),
                               kLda, kLdb, layout));
    return out.contents();
  });
  const auto at = [](int row, int column, int ld, bool by_rows) {
    return by_rows ? row * ld + column : column * ld + row;
  };
  constexpr bool kRowsA = std::is_same_v<LayoutA, wmma::row_major>;
  constexpr bool kRowsB = std::is_same_v<LayoutB, wmma::row_major>;
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      float& sum = c[at(i, j, kLdc, layout == wmma::mem_row_major)];
      for (int k = 0; k < 16; ++k)
        sum += static_cast<float>(a[at(i, k, kLda, kRowsA)]) * static_cast<float>(b[at(k, j, kLdb, kRowsB)]);
    }
  }
  EXPECT_EQ(out, c) << "and what lies between the rows is as it was";
}

TEST(Emulator, MultipliesFragments) {
  expect_product<__half, wmma::row_major, wmma::col_major>(wmma::mem_row_major);
  expect_product<__half, wmma::row_major, wmma::row_major>(wmma::mem_col_major);
  expect_product<__nv_bfloat16, wmma::col_major, wmma::row_major>(wmma::mem_row_major);
  expect_product<__nv_bfloat16, wmma::col_major, wmma::col_major>(wmma::mem_col_major);
}

TEST(Emulator, CountsBits) {
  EXPECT_EQ(__clz(1), 31);
  EXPECT_EQ(__clz(0), 32);
  EXPECT_EQ(__ffs(8), 4);
  EXPECT_EQ(__ffs(0), 0);
  EXPECT_EQ(__brev(0x80000001), 0x80000001);
  EXPECT_EQ(__brev(2), 0x40000000U);
  EXPECT_EQ(__float_as_uint(1.0F), 0x3F800000U);
}

// --------------------------------------------------------------------------------------------- what is wrong

__global__ void early_return_kernel(int* out) {
  if (threadIdx.x >= 200) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void two_barriers_kernel(int* out) {
  if (threadIdx.x < 100) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}
__global__ void barrier_in_loop_kernel(int* out) {
  for (unsigned i = 0; i <= threadIdx.x / 128; ++i) __syncthreads();
  out[threadIdx.x] = 1;
}

TEST(EmulatorFinds, DivergentBarriers) {
  EXPECT_SAYS(error_of(early_return_kernel), "56 threads have returned");
  EXPECT_SAYS(error_of(early_return_kernel), "200 threads wait for the block at ");
  EXPECT_SAYS(error_of(two_barriers_kernel), "100 threads wait for the block at ");
  EXPECT_SAYS(error_of(two_barriers_kernel), "156 threads wait for the block at ");
  EXPECT_SAYS(error_of(barrier_in_loop_kernel), "128 threads have returned");
  EXPECT_EQ(ints_of(atomic_kernel, 4)[1], kThreads - 1) << "a kernel after one that was stopped";
}

__global__ void lane_returned_kernel(int* out) {
  if (threadIdx.x % 32 == 31) return;
  out[threadIdx.x] = __shfl_down_sync(kAllLanes, 1, 1);
}
__global__ void lane_elsewhere_kernel(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_down_sync(kAllLanes, 1, 1);
  __syncthreads();
}
__global__ void caller_not_in_mask_kernel(int* out) { out[threadIdx.x] = __shfl_sync(0x7FFFFFFF, 1, 0); }
__global__ void different_masks_kernel(int*) { __syncwarp(threadIdx.x % 32 < 16 ? kAllLanes : 0xFFFF0001); }
__global__ void source_not_in_mask_kernel(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_down_sync(0xFFFF, 1, 1);
}
__global__ void lanes_of_other_warps_kernel(int* out) {
  out[threadIdx.x] = threadIdx.x < 128 ? __shfl_sync(kAllLanes, 1, 0) : __any_sync(0xFFFF, 1);
}
__global__ void no_power_of_two_kernel(int* out) { out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1, 1, 12); }

TEST(EmulatorFinds, WarpCallsWithoutTheirLanes) {
  EXPECT_SAYS(error_of(lane_returned_kernel), "wait for their warp");
  EXPECT_SAYS(error_of(lane_elsewhere_kernel), "128 threads wait for their warp");
  EXPECT_SAYS(error_of(caller_not_in_mask_kernel), "leaves out its caller (thread 31 of block 0, 0, 0)");
  EXPECT_SAYS(error_of(different_masks_kernel), "different masks");
  EXPECT_SAYS(error_of(source_not_in_mask_kernel), "reads a lane outside of its mask (thread ");
  EXPECT_SAYS(error_of(lanes_of_other_warps_kernel), "leaves out its caller (thread 144 of block");
  EXPECT_SAYS(error_of(no_power_of_two_kernel), "no power of two");
  const InWorld last_lane_first({0, emu::Order::descending});
  EXPECT_SAYS(error_of(lane_returned_kernel), "names a lane that is not there");
}

__global__ void no_guard_kernel(int* out) { out[grid_thread()] = 1; }
__global__ void shared_overrun_kernel(int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x + 1] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}
[[maybe_unused]] __global__ void misaligned_load_kernel(int* out) { out[0] = load_pack<4>(out)[0]; }
[[maybe_unused]] __global__ void misaligned_store_kernel(int* out) { store_pack(out, Pack<int, 4>{}); }
[[maybe_unused]] __global__ void misaligned_shared_kernel(int* out) {
  alignas(16) __shared__ int values[kThreads + 4];
  values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = load_pack<2>(&values[threadIdx.x])[0];
}

TEST(EmulatorFinds, MemoryErrors) {
  EXPECT_DEATH(ints_of(no_guard_kernel, kThreads + 1, 2), "heap-buffer-overflow");
  EXPECT_DEATH(ints_of(shared_overrun_kernel, kThreads), "index 256 out of bounds");
#ifndef __clang__  // which does not check the alignment of a struct that is copied
  Buffer<int> out(8, 1);
  EXPECT_DEATH(launch(misaligned_load_kernel, 1, nullptr, out.data()), "misaligned address");
  EXPECT_DEATH(launch(misaligned_store_kernel, 1, nullptr, out.data()), "misaligned address");
  EXPECT_DEATH(ints_of(misaligned_shared_kernel, kThreads), "misaligned address");
#endif
  Buffer<int> shifted(1, 1);
  shifted.data()[-1] = 0;
  EXPECT_NONFATAL_FAILURE(shifted.contents(), "before the buffer");
}

__global__ void unset_shared_kernel(int* out) {
  __shared__ int sum;
  atomicAdd(&sum, 1);
  __syncthreads();
  out[threadIdx.x] = sum;
}
template <typename T>
__global__ void unset_in_template_kernel(T* out) {
  __shared__ T values[kThreads];
  if (threadIdx.x % 2 == 0) values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}
__global__ void block_sum_everywhere_kernel(int* out) { out[threadIdx.x] = block_sum(1); }

TEST(EmulatorFinds, UnsetMemory) {
  for (const auto kernel :
       {unset_shared_kernel, unset_in_template_kernel<int>, block_sum_everywhere_kernel}) {
    EXPECT_NONFATAL_FAILURE(in_every_world([&] { return ints_of(kernel, kThreads); }), kWorldsDiffer);
  }
}

TEST(EmulatorFinds, GridsThatAreTooSmall) {
  EXPECT_NONFATAL_FAILURE(in_every_world([] { return ints_of(no_guard_kernel, 2 * kThreads, 1); }),
                          kWorldsDiffer);
}

__global__ void nothing_kernel() {}

TEST(EmulatorFinds, LaunchesBeyondTheLimits) {
  const auto error_of_launch = [](dim3 grid, dim3 block, size_t dynamic_shared = 0) {
    cudaLaunchConfig_t config{grid, block, dynamic_shared, nullptr, nullptr, 0};
    return cudaLaunchKernelEx(&config, nothing_kernel);
  };
  const size_t most_shared = 48 * 1024;
  EXPECT_EQ(error_of_launch({3, 2, 2}, {4, 4, 64}, most_shared), cudaSuccess);
  EXPECT_EQ(error_of_launch({1, 65535, 1}, 1), cudaSuccess);
  EXPECT_EQ(error_of_launch(1, 1, most_shared + 1), cudaErrorInvalidValue);
  for (const dim3 grid :
       {dim3(0), dim3(1, 0), dim3(1, 1, 0), dim3(0x80000000), dim3(1, 65536), dim3(1, 1, 65536)})
    EXPECT_EQ(error_of_launch(grid, 1), cudaErrorInvalidConfiguration);
  for (const dim3 block :
       {dim3(0), dim3(1, 0), dim3(1, 1, 0), dim3(1025), dim3(1, 1025), dim3(1, 1, 65), dim3(32, 33)})
    EXPECT_EQ(error_of_launch(1, block), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch(nothing_kernel, 0, nullptr), cudaErrorInvalidConfiguration);
}

// Kernels of one warp with a mistake around fragments; out has 16 x 16 floats.
__global__ void lane_without_fragment_kernel(float* out) {
  Sum sum;
  wmma::fill_fragment(sum, 1.0F);
  if (threadIdx.x == 31) return;
  wmma::store_matrix_sync(out, sum, 16, wmma::mem_row_major);
}
__global__ void lanes_of_one_half_kernel(float* out) {
  Sum sum;
  wmma::fill_fragment(sum, 1.0F);
  if (threadIdx.x < 16) wmma::store_matrix_sync(out, sum, 16, wmma::mem_row_major);
}
__global__ void two_matrices_kernel(float* out) {
  Sum sum;
  wmma::load_matrix_sync(sum, out + threadIdx.x / 16 * 8, 16, wmma::mem_row_major);
}
__global__ void misaligned_fragment_kernel(float* out) {
  Sum sum;
  wmma::load_matrix_sync(sum, out + 4, 16, wmma::mem_row_major);
}
__global__ void odd_rows_kernel(float* out) {
  Sum sum;
  wmma::load_matrix_sync(sum, out, 18, wmma::mem_row_major);
}
__global__ void odd_half_rows_kernel(float* out) {
  Left<__half, wmma::row_major> left;
  wmma::load_matrix_sync(left, reinterpret_cast<__half*>(out), 20);
}

std::string error_of_fragments(void (*kernel)(float*)) {
  Buffer<float> out(16 * 16);
  try {
    expect_success(launch_warp(kernel, out.data()));
  } catch (const emu::Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(EmulatorFinds, FragmentsWithoutTheirLanes) {
  EXPECT_SAYS(error_of_fragments(lane_without_fragment_kernel), "names a lane that is not there");
  EXPECT_SAYS(error_of_fragments(lanes_of_one_half_kernel), "16 threads wait for their warp");
  EXPECT_SAYS(error_of_fragments(two_matrices_kernel), "lanes give different matrices");
}

TEST(EmulatorFinds, FragmentsOfMisalignedMatrices) {
  EXPECT_SAYS(error_of_fragments(misaligned_fragment_kernel), "not aligned to 256 bits");
  EXPECT_SAYS(error_of_fragments(odd_rows_kernel), "no multiple of 4");
  EXPECT_SAYS(error_of_fragments(odd_half_rows_kernel), "no multiple of 8");
}

__global__ void rows_too_long_kernel(float* out) {
  Sum sum;
  wmma::load_matrix_sync(sum, out, 20, wmma::mem_row_major);
}
__global__ void knows_the_layout_kernel(float* out) {
  Sum sum;
  wmma::fill_fragment(sum, 1.0F);
  for (int i = 0; i < sum.num_elements; ++i) sum.x[i] *= static_cast<float>(threadIdx.x / 4);
  wmma::store_matrix_sync(out, sum, 16, wmma::mem_row_major);
}
__global__ void unset_fragment_kernel(float* out) {
  Sum sum;
  wmma::store_matrix_sync(out, sum, 16, wmma::mem_row_major);
}
struct SharedTile {
  alignas(32) float at[16][16];
};
__global__ void reads_before_the_warp_kernel(float* out) {
  __shared__ SharedTile tile;
  Sum sum;
  wmma::fill_fragment(sum, 3.0F);
  wmma::store_matrix_sync(&tile.at[0][0], sum, 16, wmma::mem_row_major);
  for (int i = 0; i < 8; ++i) out[threadIdx.x * 8 + i] = tile.at[threadIdx.x / 2][threadIdx.x % 2 * 8 + i];
}

TEST(EmulatorFinds, WhatFragmentsDoNotPromise) {
  EXPECT_DEATH(error_of_fragments(rows_too_long_kernel), "heap-buffer-overflow");
  for (const auto kernel : {knows_the_layout_kernel, unset_fragment_kernel, reads_before_the_warp_kernel}) {
    const auto run = [&] {
      Buffer<float> out(16 * 16);
      expect_success(launch_warp(kernel, out.data()));
      return out.contents();
    };
    EXPECT_NONFATAL_FAILURE(in_every_world(run), kWorldsDiffer);
  }
}

template <int kShift>
__global__ void no_barrier_kernel(int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = values[(threadIdx.x + kShift) % kThreads];
}
__global__ void warps_out_of_step_kernel(int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncwarp();
  __syncwarp();
  out[threadIdx.x] = values[(threadIdx.x + 128) % kThreads];
}
__global__ void barrier_before_write_missing_kernel(int* out) {
  __shared__ int value;
  int sum = 0;
  for (unsigned i = 0; i < kThreads; ++i) {
    if (threadIdx.x == i) value = static_cast<int>(i);
    __syncthreads();
    sum += value;
  }
  out[threadIdx.x] = sum;
}
__global__ void scratch_used_twice_kernel(int* out) {
  using Reduce = cub::BlockReduce<int, kThreads>;
  __shared__ typename Reduce::TempStorage scratch;
  const int first = Reduce(scratch).Sum(1);
  const int second = Reduce(scratch).Sum(2);
  if (threadIdx.x == 0) out[0] = first, out[1] = second;
}

TEST(EmulatorFinds, MissingBarriers) {
  for (const auto kernel : {no_barrier_kernel<1>, no_barrier_kernel<kThreads - 1>, no_barrier_kernel<128>,
                            warps_out_of_step_kernel, barrier_before_write_missing_kernel}) {
    EXPECT_NONFATAL_FAILURE(in_every_world([&] { return ints_of(kernel, kThreads); }), kWorldsDiffer);
  }
  EXPECT_NONFATAL_FAILURE(in_every_world([] { return ints_of(scratch_used_twice_kernel, 2); }),
                          kWorldsDiffer);
}

__global__ void last_block_wins_kernel(int* out) { *out = static_cast<int>(blockIdx.x); }

TEST(EmulatorFinds, AndNamesTheSeed) {
  const emu::World world{0x17, emu::Order::shuffled, 23};
  const InWorld inside(world);
  EXPECT_SAYS(error_of(two_barriers_kernel), "TORCHQAT_EMU_SEED=23");
  EXPECT_SAYS(error_of(no_power_of_two_kernel), "TORCHQAT_EMU_SEED=23");
  EXPECT_DEATH(ints_of(no_guard_kernel, kThreads + 1, 2), "emulated with poison 0x17, shuffled .*_SEED=23");
  EXPECT_DEATH(ints_of(shared_overrun_kernel, kThreads), "emulated with poison 0x17, shuffled .*_SEED=23");
  const auto run = [] { return ints_of(last_block_wins_kernel, 1, 999); };
  EXPECT_NONFATAL_FAILURE(in_every_world(run), emu::name_of(worlds().back()));
}

TEST(EmulatorFinds, DependenceOnTheOrderOfBlocks) {
  EXPECT_NONFATAL_FAILURE(in_every_world([] { return ints_of(last_block_wins_kernel, 1, 5); }),
                          kWorldsDiffer);
}

}  // namespace
}  // namespace testing
}  // namespace torchqat::cuda
