#pragma once

#include "affinity_tensor_tiles.cuh"
#include "affinity_tiles.cuh"

// Kernels of the l1 feature affinity loss and their launches, over raw pointers: the sum of |S_ij| over
// i != j for each of some images, and its gradient in the student's unit columns. S is made tile by tile and
// never kept.
namespace torchqat::cuda {

constexpr int64_t tiles_of(int64_t pixels) { return (pixels + kSide - 1) / kSide; }

// A block takes every tile of so many rows that comes to it, and leaves one partial sum.
template <typename Tiles>
__global__ void __launch_bounds__(kThreads, Tiles::kBlocksAtOnce)
    affinity_value_kernel(Tiles tiles, int64_t blocks_per_image, double* __restrict__ partial) {
  __shared__ typename Tiles::Stage stage;
  const int64_t image = blockIdx.x / blocks_per_image;
  const int64_t side = tiles_of(tiles.pixels);
  const int64_t apart = side / 2 + 1;
  double total = 0;
  // S is symmetric: of the tiles (i, j) and (j, i) one is enough. With j = i, i + 1, .., i + side / 2 modulo
  // side every i has as many as every other.
  for (int64_t tile = blockIdx.x % blocks_per_image; tile < side * apart; tile += blocks_per_image) {
    const int64_t i = tile % side;
    const int64_t d = tile / side;
    if (2 * d == side && i >= d) continue;  // opposite tiles meet from both sides
    const double sum = tiles.sum(stage, image, i * kSide, (i + d) % side * kSide, nullptr);
    total += d == 0 ? sum : 2 * sum;
  }
  total = block_sum(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// A block has 64 pixels, and goes through all the others: the gradient of its pixels is written by no other.
// Here it is that of half the value, the sum over j of sign(S_ij) a_j.
template <typename Tiles>
__global__ void __launch_bounds__(kThreads, Tiles::kBlocksAtOnce)
    affinity_gradient_kernel(Tiles tiles, double* __restrict__ partial) {
  __shared__ typename Tiles::Stage stage;
  __shared__ typename Tiles::Signs signs;
  const int64_t side = tiles_of(tiles.pixels);
  const int64_t image = blockIdx.x / side;
  const int64_t row = blockIdx.x % side * kSide;
  const bool in_registers = tiles.fits_sums();
  double total = 0;
  typename Tiles::Sums sums;
  sums.clear();
  for (int64_t column = 0; column < tiles.pixels; column += kSide) {
    total += tiles.sum(stage, image, row, column, &signs);
    for (int64_t channel = 0; channel < tiles.student.channels; channel += kSide) {
      if (!in_registers) {
        if (column == 0) {
          sums.clear();
        } else {
          tiles.load(image, row, channel, sums);
        }
      }
      tiles.add_signs(stage, signs, image, column, channel, sums);
      if (!in_registers) tiles.store(image, row, channel, sums);
    }
  }
  if (in_registers) tiles.store(image, row, 0, sums);
  total = block_sum(total);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

// The values of images from the partial sums of their blocks, in the order of these; a block for each.
template <typename sum_t>
__global__ void __launch_bounds__(kThreads)
    affinity_sum_kernel(const sum_t* __restrict__ partial, int64_t per_image, sum_t* __restrict__ values) {
  const sum_t sum = sum_slots(partial + blockIdx.x * per_image, per_image);
  if (threadIdx.x == 0) values[blockIdx.x] = sum;
}

// Partial sums for each image, with the gradient and without.
inline int64_t affinity_partials(int64_t images, int64_t pixels, bool differentiate) {
  const int64_t side = tiles_of(pixels);
  if (differentiate) return side;
  return std::min(side * (side / 2 + 1), std::max<int64_t>(1, kMaxBlocks / images));
}

// `values` gets the sum of each image, `tiles.grad` where it is not null the gradient of half of it.
// `partial` holds images * affinity_partials() doubles.
template <typename Tiles>
cudaError_t launch_l1_affinity(const Tiles& tiles, int64_t images, bool differentiate, double* partial,
                               double* values, cudaStream_t stream) {
  const int64_t per_image = affinity_partials(images, tiles.pixels, differentiate);
  const auto blocks = static_cast<unsigned>(images * per_image);
  const auto error = differentiate
                         ? launch(affinity_gradient_kernel<Tiles>, blocks, stream, tiles, partial)
                         : launch(affinity_value_kernel<Tiles>, blocks, stream, tiles, per_image, partial);
  if (error != cudaSuccess) return error;
  return launch(affinity_sum_kernel<double>, static_cast<unsigned>(images), stream, partial, per_image,
                values);
}

}  // namespace torchqat::cuda
