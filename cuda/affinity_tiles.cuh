#pragma once

#include "feature_columns.cuh"

// Tiles of S = A'A - B'B by fused multiply-adds, in float or double.
namespace torchqat::cuda {

// A tile has so many rows and columns of S; a thread has a square of 4 x 4 of them.
constexpr int kSide = 64;
constexpr int kOwn = 4;
// Pixels that fill the rows of unit columns: a thread's four are all there or none.
constexpr int kRowMultiple = kOwn;

// Where a thread's square begins. In a warp eight squares lie side by side, four one above the other: shared
// memory serves such a warp's 16-byte loads without conflicts, of rows and columns alike.
struct TileThread {
  int row, column;

  __device__ TileThread() {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    row = (warp / 2 * 4 + lane / 8) * kOwn;
    column = (warp % 2 * 8 + lane % 8) * kOwn;
  }
};

// One image's unit columns of the student (A) and the teacher (B).
template <typename T>
struct FmaTiles {
  UnitColumns<const T> student, teacher;
  UnitColumns<T> grad;  // of the student's unit columns; data is null where none is wanted
  int64_t pixels;

  static constexpr int kBlocksAtOnce = sizeof(T) == 8 ? 1 : 2;  // on a multiprocessor, at least

  // Channels, or pixels, of which a stage holds the numbers of a whole tile.
  static constexpr int kDepth = 128 / sizeof(T);
  static constexpr int kPack = 16 / sizeof(T);
  static constexpr int kPacks = kDepth * kSide / kPack / kThreads;  // a thread's, of a stage's part
  static constexpr int kPadding = kPack;  // puts neighboring rows in different banks

  union Stage {
    struct {
      alignas(16) T rows[kDepth][kSide], columns[kDepth][kSide];
    } factors;
    alignas(16) T channels[kSide][kDepth + kPadding];  // of a tile's columns
  };
  // Signs of S, transposed.
  struct Signs {
    alignas(16) float at[kSide][kSide + 4];
  };
  // A thread's part of a tile of the gradient, 64 pixels x 64 channels: pixels from TileThread::row on, and
  // channels that are kApart from each other. Stays in registers from tile to tile where there are no more
  // channels than these.
  static constexpr int kApart = kSide / kOwn;
  struct Sums {
    T at[kOwn][kOwn];
    __device__ void clear() { *this = {}; }
  };
  using Packs = Pack<T, kPack>[kPacks];

  // A part of a matrix: `depth` rows of 64 or 64 rows of `depth`, the one or the other by `across`. What lies
  // beyond the matrix is 0.
  static __device__ void fetch(const UnitColumns<const T>& from, int64_t image, int64_t channel,
                               int64_t pixel, int across, Packs& packs) {
    TORCHQAT_UNROLL
    for (int k = 0; k < kPacks; ++k) {
      const int element = (static_cast<int>(threadIdx.x) + k * kThreads) * kPack;
      const int64_t c = channel + element / across;
      const int64_t n = pixel + element % across;
      if (c < from.channels && n < from.row) {
        packs[k] = load_pack<kPack>(from.image(image) + c * from.row + n);
      } else {
        packs[k] = {};
      }
    }
  }
  template <int across, int padded>
  static __device__ void put(const Packs& packs, T (&to)[kDepth * kSide / across][padded]) {
    TORCHQAT_UNROLL
    for (int k = 0; k < kPacks; ++k) {
      const int element = (static_cast<int>(threadIdx.x) + k * kThreads) * kPack;
      *reinterpret_cast<Pack<T, kPack>*>(&to[element / across][element % across]) = packs[k];
    }
  }

  // s += weight * the products of columns over up to kDepth channels of a matrix. They are added apart: what
  // A and B have in common cancels before it has cost digits, and all of it where A = B.
  static __device__ void add_products(const Stage& stage, int64_t depth, T weight, T (&s)[kOwn][kOwn]) {
    const TileThread mine;
    T products[kOwn][kOwn] = {};
    for (int begin = 0; begin < kDepth && begin < depth; begin += 8) {
      TORCHQAT_UNROLL
      for (int k = 0; k < 8; ++k) {
        const auto x = load_pack<kOwn>(&stage.factors.rows[begin + k][mine.row]);
        const auto y = load_pack<kOwn>(&stage.factors.columns[begin + k][mine.column]);
        TORCHQAT_UNROLL
        for (int r = 0; r < kOwn; ++r) {
          TORCHQAT_UNROLL
          for (int q = 0; q < kOwn; ++q) products[r][q] += x[r] * y[q];
        }
      }
    }
    TORCHQAT_UNROLL
    for (int r = 0; r < kOwn; ++r) {
      TORCHQAT_UNROLL
      for (int q = 0; q < kOwn; ++q) s[r][q] += weight * products[r][q];
    }
  }

  // This thread's square of a tile of S.
  __device__ void fill(Stage& stage, int64_t image, int64_t row, int64_t column, T (&s)[kOwn][kOwn]) const {
    const int64_t most = student.channels > teacher.channels ? student.channels : teacher.channels;
    const int64_t steps = 2 * ((most + kDepth - 1) / kDepth);  // A's channels and B's by turns
    const auto matrix = [&](int64_t step) {  // by its members: a reference would send both to local memory
      const bool of_student = step % 2 == 0;
      return UnitColumns<const T>{
          of_student ? student.data : teacher.data, of_student ? student.channels : teacher.channels,
          of_student ? student.row : teacher.row, of_student ? student.image_stride : teacher.image_stride};
    };
    const auto next = [&](int64_t step) {  // the step after this one that has channels
      for (++step; step < steps && step / 2 * kDepth >= matrix(step).channels;) ++step;
      return step;
    };
    Packs rows, columns;
    const auto fetch_step = [&](int64_t step) {
      fetch(matrix(step), image, step / 2 * kDepth, row, kSide, rows);
      fetch(matrix(step), image, step / 2 * kDepth, column, kSide, columns);
    };
    int64_t step = next(-1);
    if (step < steps) fetch_step(step);
    while (step < steps) {
      __syncthreads();  // what was done with the stage before
      put<kSide>(rows, stage.factors.rows);
      put<kSide>(columns, stage.factors.columns);
      __syncthreads();
      const int64_t following = next(step);
      if (following < steps) fetch_step(following);
      add_products(stage, matrix(step).channels - step / 2 * kDepth, step % 2 == 0 ? T(1) : T(-1), s);
      step = following;
    }
  }

  // This thread's share of the sum of |S_ij| over a tile, i != j; and the signs where they are wanted.
  __device__ double sum(Stage& stage, int64_t image, int64_t row, int64_t column, Signs* signs) const {
    const TileThread mine;
    T s[kOwn][kOwn] = {};
    fill(stage, image, row, column, s);
    T total = 0;
    TORCHQAT_UNROLL
    for (int q = 0; q < kOwn; ++q) {
      Pack<float, kOwn> of_column;
      TORCHQAT_UNROLL
      for (int r = 0; r < kOwn; ++r) {
        if (row + mine.row + r == column + mine.column + q) s[r][q] = 0;
        total += math::magnitude(s[r][q]);
        of_column[r] = static_cast<float>(math::sign(s[r][q]));
      }
      if (signs != nullptr)
        *reinterpret_cast<Pack<float, kOwn>*>(&signs->at[mine.column + q][mine.row]) = of_column;
    }
    return static_cast<double>(total);
  }

  __device__ bool fits_sums() const { return student.channels <= kSide; }

  // Where this thread's sums for channel q of its four are in memory; null where there is no such channel or
  // pixel.
  __device__ T* place(int64_t image, int64_t row, int64_t channel, int q) const {
    const TileThread mine;
    const int64_t c = channel + mine.column / kOwn + q * kApart;
    const int64_t n = row + mine.row;
    return c < grad.channels && n < grad.row ? grad.image(image) + c * grad.row + n : nullptr;
  }
  __device__ void load(int64_t image, int64_t row, int64_t channel, Sums& sums) const {
    TORCHQAT_UNROLL
    for (int q = 0; q < kOwn; ++q) {
      const T* from = place(image, row, channel, q);
      const auto pack = from != nullptr ? load_pack<kOwn>(from) : Pack<T, kOwn>{};
      TORCHQAT_UNROLL
      for (int r = 0; r < kOwn; ++r) sums.at[r][q] = pack[r];
    }
  }
  __device__ void store(int64_t image, int64_t row, int64_t channel, const Sums& sums) const {
    TORCHQAT_UNROLL
    for (int q = 0; q < kOwn; ++q) {
      T* to = place(image, row, channel, q);
      Pack<T, kOwn> pack;
      TORCHQAT_UNROLL
      for (int r = 0; r < kOwn; ++r) pack[r] = sums.at[r][q];
      if (to != nullptr) store_pack(to, pack);
    }
  }

  // sums += the signs of a tile times the tile's columns of A.
  __device__ void add_signs(Stage& stage, const Signs& signs, int64_t image, int64_t column, int64_t channel,
                            Sums& sums) const {
    const TileThread mine;
    for (int begin = 0; begin < kSide; begin += kDepth) {
      Packs packs;
      fetch(student, image, channel, column + begin, kDepth, packs);
      __syncthreads();  // what was done with the stage before, and the signs are there
      put<kDepth>(packs, stage.channels);
      __syncthreads();
      TORCHQAT_UNROLL
      for (int k = 0; k < kDepth; k += kOwn) {
        Pack<float, kOwn> sign[kOwn];
        TORCHQAT_UNROLL
        for (int e = 0; e < kOwn; ++e) sign[e] = load_pack<kOwn>(&signs.at[begin + k + e][mine.row]);
        TORCHQAT_UNROLL
        for (int q = 0; q < kOwn; ++q) {
          if (channel + q * kApart >= student.channels) break;
          const auto a = load_pack<kOwn>(&stage.channels[mine.column / kOwn + q * kApart][k]);
          TORCHQAT_UNROLL
          for (int e = 0; e < kOwn; ++e) {
            TORCHQAT_UNROLL
            for (int r = 0; r < kOwn; ++r) sums.at[r][q] += static_cast<T>(sign[e][r]) * a[e];
          }
        }
      }
    }
  }
};

}  // namespace torchqat::cuda
