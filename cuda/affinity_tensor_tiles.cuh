#pragma once

#include <mma.h>

#include "affinity_tiles.cuh"
#include "scaled_columns.cuh"

// Tiles of S = A'A - B'B by tensor cores, for features in half precision. Products of features are exact and
// added in float; nothing is rounded to half precision but the factor that brings a column of A to unit
// length in the gradient.
namespace torchqat::cuda {

constexpr int kFragment = 16;  // side of the matrices that a warp multiplies

template <typename half_t>
struct TensorTiles {
  ScaledColumns<const half_t> student, teacher;
  float* grad;  // as `student`: images, its pixels, its channels; null where none is wanted
  int64_t pixels;

  static constexpr int kBlocksAtOnce = 2;  // on a multiprocessor, at least

  // What a block keeps in shared memory: pixels of a tile, 64 of their channels at a time.
  static constexpr int kDepth = 64;
  static constexpr int kPack = 8;
  static constexpr int kRow = kDepth + kPack;  // puts neighboring rows in different banks
  using Rows = half_t[kSide][kRow];

  // A warp has 16 rows of a tile and 32 columns, as two fragments.
  static constexpr int kOwnFragments = 2;
  struct Place {
    int row, column;
    __device__ Place() {
      const int warp = static_cast<int>(threadIdx.x) / 32;
      row = warp / 2 * kFragment;
      column = warp % 2 * kOwnFragments * kFragment;
    }
  };
  using Left = nvcuda::wmma::fragment<nvcuda::wmma::matrix_a, kFragment, kFragment, kFragment, half_t,
                                      nvcuda::wmma::row_major>;
  template <typename Layout>
  using Right =
      nvcuda::wmma::fragment<nvcuda::wmma::matrix_b, kFragment, kFragment, kFragment, half_t, Layout>;
  using Sum = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, kFragment, kFragment, kFragment, float>;
  struct Sums {
    Sum at[kOwnFragments];
    __device__ void clear() {
      for (auto& sum : at) nvcuda::wmma::fill_fragment(sum, 0.0F);
    }
  };

  struct Stage {
    union {
      struct {
        alignas(32) Rows rows, columns;
      } factors;
      // A fragment of A'A and one of B'B of each warp.
      alignas(32) float products[kThreads / 32][2][kFragment][kFragment];
    };
    alignas(16) float scales[2][2][kSide];  // of the student and the teacher, for rows and for columns
  };
  // The signs of S times what remains to be multiplied with a column's scaled features, and 2^(2k), so that
  // it is no smaller than half precision likes.
  struct Signs {
    alignas(32) half_t at[kSide][kSide + kPack];
  };
  static constexpr float kSignScale = 1 << 2 * kScaledExponent<half_t>;

  // 64 pixels from `pixel` on, 64 channels from `channel` on; 0 where the matrix ends.
  static __device__ void stage_rows(const ScaledColumns<const half_t>& from, int64_t image, int64_t pixel,
                                    int64_t channel, Rows& to) {
    constexpr int kPacks = kSide * kDepth / kPack / kThreads;
    Pack<half_t, kPack> packs[kPacks];
    TORCHQAT_UNROLL
    for (int k = 0; k < kPacks; ++k) {
      const int element = (static_cast<int>(threadIdx.x) + k * kThreads) * kPack;
      const int64_t n = pixel + element / kDepth;
      const int64_t c = channel + element % kDepth;
      if (n < from.pixels && c < from.channels) {
        packs[k] = load_pack<kPack>(from.row(image, n) + c);
      } else {
        TORCHQAT_UNROLL
        for (int e = 0; e < kPack; ++e) packs[k][e] = converted<half_t>(0.0F);
      }
    }
    TORCHQAT_UNROLL
    for (int k = 0; k < kPacks; ++k) {
      const int element = (static_cast<int>(threadIdx.x) + k * kThreads) * kPack;
      *reinterpret_cast<Pack<half_t, kPack>*>(&to[element / kDepth][element % kDepth]) = packs[k];
    }
  }
  static __device__ void stage_scales(const ScaledColumns<const half_t>& from, int64_t image, int64_t row,
                                      int64_t column, float (&to)[2][kSide]) {
    if (threadIdx.x >= 2 * kSide) return;
    const bool of_row = threadIdx.x < kSide;
    const int64_t n = (of_row ? row : column) + threadIdx.x % kSide;
    to[of_row ? 0 : 1][threadIdx.x % kSide] = n < from.pixels ? from.scale[image * from.pixels + n] : 0.0F;
  }

  // The products of the columns of one matrix, over all channels.
  static __device__ void multiply(const ScaledColumns<const half_t>& matrix, Stage& stage, int64_t image,
                                  int64_t row, int64_t column, Sums& products) {
    const Place mine;
    products.clear();
    for (int64_t channel = 0; channel < matrix.channels; channel += kDepth) {
      __syncthreads();  // what was done with the stage before
      stage_rows(matrix, image, row, channel, stage.factors.rows);
      stage_rows(matrix, image, column, channel, stage.factors.columns);
      __syncthreads();
      for (int k = 0; k < kDepth && channel + k < matrix.channels; k += kFragment) {
        Left left;
        nvcuda::wmma::load_matrix_sync(left, &stage.factors.rows[mine.row][k], kRow);
        TORCHQAT_UNROLL
        for (int f = 0; f < kOwnFragments; ++f) {
          Right<nvcuda::wmma::col_major> right;
          nvcuda::wmma::load_matrix_sync(right, &stage.factors.columns[mine.column + f * kFragment][k], kRow);
          nvcuda::wmma::mma_sync(products.at[f], left, right, products.at[f]);
        }
      }
    }
  }

  // This thread's share of the sum of |S_ij| over a tile, i != j; and the signs where they are wanted.
  __device__ double sum(Stage& stage, int64_t image, int64_t row, int64_t column, Signs* signs) const {
    const Place mine;
    Sums students, teachers;
    multiply(student, stage, image, row, column, students);
    multiply(teacher, stage, image, row, column, teachers);
    stage_scales(student, image, row, column, stage.scales[0]);
    stage_scales(teacher, image, row, column, stage.scales[1]);
    __syncthreads();  // the scales are there, and products[] is free
    float total = 0;
    TORCHQAT_UNROLL
    for (int f = 0; f < kOwnFragments; ++f) {
      auto& products = stage.products[threadIdx.x / 32];
      nvcuda::wmma::store_matrix_sync(&products[0][0][0], students.at[f], kFragment,
                                      nvcuda::wmma::mem_row_major);
      nvcuda::wmma::store_matrix_sync(&products[1][0][0], teachers.at[f], kFragment,
                                      nvcuda::wmma::mem_row_major);
      __syncwarp();
      TORCHQAT_UNROLL
      for (int k = 0; k < kFragment; k += 8) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const int r = lane / kOwn + k;
        const int q = lane % kOwn * kOwn;
        total += finish(stage, load_pack<kOwn>(&products[0][r][q]), load_pack<kOwn>(&products[1][r][q]),
                        mine.row + r, mine.column + f * kFragment + q, row - column, signs);
      }
      __syncwarp();  // the next fragment may take the place
    }
    return static_cast<double>(total);
  }

  // Four of a row of a tile of S, from the products on: adds their magnitudes, keeps their signs. `ahead` is
  // how much the tile's first row comes after its first column. Products and differences are rounded one by
  // one: S is symmetric, and 0 where A = B.
  static __device__ float finish(const Stage& stage, const Pack<float, kOwn>& students,
                                 const Pack<float, kOwn>& teachers, int r, int q, int64_t ahead,
                                 Signs* signs) {
    const float a = stage.scales[0][0][r];
    const float b = stage.scales[1][0][r];
    const auto as = load_pack<kOwn>(&stage.scales[0][1][q]);
    const auto bs = load_pack<kOwn>(&stage.scales[1][1][q]);
    float total = 0;
    Pack<half_t, kOwn> kept;
    TORCHQAT_UNROLL
    for (int e = 0; e < kOwn; ++e) {
      float s =
          __fsub_rn(__fmul_rn(students[e], __fmul_rn(a, as[e])), __fmul_rn(teachers[e], __fmul_rn(b, bs[e])));
      if (ahead + r == q + e) s = 0;
      total += math::magnitude(s);
      kept[e] = converted<half_t>(math::sign(s) * (as[e] * kSignScale));
    }
    if (signs != nullptr) *reinterpret_cast<Pack<half_t, kOwn>*>(&signs->at[r][q]) = kept;
    return total;
  }

  __device__ bool fits_sums() const { return student.channels <= kDepth; }

  // Where a fragment of the warp's sums is in memory; null where there is no such channel or pixel.
  __device__ float* place(int64_t image, int64_t row, int64_t channel, int f) const {
    const Place mine;
    const int64_t n = row + mine.row;
    const int64_t c = channel + mine.column + f * kFragment;
    if (n >= student.pixels || c >= student.channels) return nullptr;
    return grad + (image * student.pixels + n) * student.channels + c;
  }
  __device__ void load(int64_t image, int64_t row, int64_t channel, Sums& sums) const {
    TORCHQAT_UNROLL
    for (int f = 0; f < kOwnFragments; ++f) {
      const float* from = place(image, row, channel, f);
      if (from != nullptr)
        nvcuda::wmma::load_matrix_sync(sums.at[f], from, student.channels, nvcuda::wmma::mem_row_major);
    }
  }
  __device__ void store(int64_t image, int64_t row, int64_t channel, const Sums& sums) const {
    TORCHQAT_UNROLL
    for (int f = 0; f < kOwnFragments; ++f) {
      float* to = place(image, row, channel, f);
      if (to != nullptr)
        nvcuda::wmma::store_matrix_sync(to, sums.at[f], student.channels, nvcuda::wmma::mem_row_major);
    }
  }

  // sums += the signs of a tile times the tile's columns of A.
  __device__ void add_signs(Stage& stage, const Signs& signs, int64_t image, int64_t column, int64_t channel,
                            Sums& sums) const {
    const Place mine;
    __syncthreads();  // what was done with the stage before, and the signs are there
    stage_rows(student, image, column, channel, stage.factors.columns);
    __syncthreads();
    for (int k = 0; k < kSide; k += kFragment) {
      Left left;
      nvcuda::wmma::load_matrix_sync(left, &signs.at[mine.row][k], kSide + kPack);
      TORCHQAT_UNROLL
      for (int f = 0; f < kOwnFragments; ++f) {
        if (channel + mine.column + f * kFragment >= student.channels) break;
        Right<nvcuda::wmma::row_major> right;
        nvcuda::wmma::load_matrix_sync(right, &stage.factors.columns[k][mine.column + f * kFragment], kRow);
        nvcuda::wmma::mma_sync(sums.at[f], left, right, sums.at[f]);
      }
    }
  }
};

}  // namespace torchqat::cuda
