#pragma once

// Stands in for CUDA's header of this name: matrices of 16 x 16 in half precision that the lanes of a warp
// multiply together. A device does not say which lane holds which elements of a fragment; here that changes
// from world to world, and no lane holds another's.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

namespace nvcuda::wmma {

struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };
struct matrix_a {};
struct matrix_b {};
struct accumulator {};

// What nobody filled holds the world's poison. Copies keep it.
template <typename Use, int m, int n, int k, typename T, typename Layout = void>
class fragment {
  static_assert(m == 16 && n == 16 && k == 16, "the only shape that there is here");
  static_assert(std::is_same_v<Use, accumulator>
                    ? std::is_same_v<T, float> && std::is_void_v<Layout>
                    : (std::is_same_v<T, __half> ||
                       std::is_same_v<T, __nv_bfloat16>)&&(std::is_same_v<Layout, row_major> ||
                                                           std::is_same_v<Layout, col_major>),
                "the only types that there are here");

 public:
  static constexpr int num_elements = 16 * 16 / emu::kWarpSize;
  T x[num_elements];

  fragment() { std::memset(static_cast<void*>(x), emu::world.poison, sizeof(x)); }
};

}  // namespace nvcuda::wmma

namespace emu {

constexpr int kSide = 16;

// Where element i of a lane's part of a fragment is in the matrix, row by row. 113 and 37 are odd: a
// permutation.
inline int element_of(unsigned lane, int i) {
  const int number = static_cast<int>(lane) * (kSide * kSide / static_cast<int>(kWarpSize)) + i;
  const int step = world.order == Order::ascending ? 1 : world.order == Order::descending ? 113 : 37;
  return (number * step + world.poison) % (kSide * kSide);
}

// Waits for all lanes of the warp, then calls work(the pointers that they bring) once.
inline void together(void* own, const Site& site, const std::function<void(void* const*)>& work) {
  warp_call({WarpCall::Kind::together, site, 0xFFFFFFFF, 0, 0, 0, &work, own});
}

// Where a fragment is loaded from or stored to, as each lane says.
struct MatrixPlace {
  const void* pointer;
  unsigned ldm;
  int layout;
};

template <typename T>
void meet_at(MatrixPlace place, const Site& site) {
  if (reinterpret_cast<uintptr_t>(place.pointer) % 32 != 0)
    fail("the matrix of a fragment is not aligned to 256 bits", site);
  const unsigned multiple = 16 / sizeof(T);
  if (place.ldm % multiple != 0)
    fail("the leading dimension of a fragment's matrix is no multiple of " + std::to_string(multiple), site);
  together(&place, site, [&](void* const* of_lanes) {
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      const auto& other = *static_cast<const MatrixPlace*>(of_lanes[lane]);
      if (other.pointer != place.pointer || other.ldm != place.ldm || other.layout != place.layout)
        fail("lanes give different matrices for one fragment", site);
    }
  });
}

inline size_t offset_of(int element, unsigned ldm, bool by_rows) {
  const size_t row = element / kSide;
  const size_t column = element % kSide;
  return by_rows ? row * ldm + column : column * ldm + row;
}

template <typename Fragment, typename T>
void load_own(Fragment& fragment, const T* from, unsigned ldm, bool by_rows) {
  for (int i = 0; i < Fragment::num_elements; ++i)
    fragment.x[i] = from[offset_of(element_of(linear_thread() % kWarpSize, i), ldm, by_rows)];
}

}  // namespace emu

namespace nvcuda::wmma {

template <typename Use, typename T, typename Layout>
void fill_fragment(fragment<Use, 16, 16, 16, T, Layout>& a, const std::type_identity_t<T>& value,
                   emu::Site site = emu::Site::current()) {
  emu::together(nullptr, site, [](void* const*) {});
  for (T& x : a.x) x = value;
}

// All lanes are there when the first one reads; nobody waits for the last one to have read.
template <typename Use, typename T, typename Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& a, const T* from, unsigned ldm,
                      emu::Site site = emu::Site::current()) {
  emu::meet_at<T>({from, ldm, 0}, site);
  emu::load_own(a, from, ldm, std::is_same_v<Layout, row_major>);
}
template <typename T>
void load_matrix_sync(fragment<accumulator, 16, 16, 16, T>& a, const T* from, unsigned ldm, layout_t layout,
                      emu::Site site = emu::Site::current()) {
  emu::meet_at<T>({from, ldm, layout}, site);
  emu::load_own(a, from, ldm, layout == mem_row_major);
}

// Others see what a lane stores after __syncwarp, or a barrier.
template <typename T>
void store_matrix_sync(T* to, const fragment<accumulator, 16, 16, 16, T>& a, unsigned ldm, layout_t layout,
                       emu::Site site = emu::Site::current()) {
  emu::meet_at<T>({to, ldm, layout}, site);
  for (int i = 0; i < a.num_elements; ++i)
    to[emu::offset_of(emu::element_of(emu::linear_thread() % emu::kWarpSize, i), ldm,
                      layout == mem_row_major)] = a.x[i];
}

// d = a b + c. Products are exact, and added in float.
template <typename T, typename LayoutA, typename LayoutB>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& d,
              const fragment<matrix_a, 16, 16, 16, T, LayoutA>& a,
              const fragment<matrix_b, 16, 16, 16, T, LayoutB>& b,
              const fragment<accumulator, 16, 16, 16, float>& c, emu::Site site = emu::Site::current()) {
  struct Operands {
    float* d;
    const T *a, *b;
    const float* c;
  } own{d.x, a.x, b.x, c.x};
  emu::together(&own, site, [](void* const* of_lanes) {
    using emu::kSide;
    constexpr int kEach = fragment<accumulator, 16, 16, 16, float>::num_elements;
    float as[kSide][kSide], bs[kSide][kSide], ds[kSide][kSide];
    for (unsigned lane = 0; lane < emu::kWarpSize; ++lane) {
      const auto& of_lane = *static_cast<const Operands*>(of_lanes[lane]);
      for (int i = 0; i < kEach; ++i) {
        const int at = emu::element_of(lane, i);
        as[at / kSide][at % kSide] = static_cast<float>(of_lane.a[i]);
        bs[at / kSide][at % kSide] = static_cast<float>(of_lane.b[i]);
        ds[at / kSide][at % kSide] = of_lane.c[i];
      }
    }
    for (int i = 0; i < kSide; ++i) {
      for (int k = 0; k < kSide; ++k) {
        for (int j = 0; j < kSide; ++j) ds[i][j] += as[i][k] * bs[k][j];
      }
    }
    for (unsigned lane = 0; lane < emu::kWarpSize; ++lane) {
      const auto& of_lane = *static_cast<const Operands*>(of_lanes[lane]);
      for (int i = 0; i < kEach; ++i) {
        const int at = emu::element_of(lane, i);
        of_lane.d[i] = ds[at / kSide][at % kSide];
      }
    }
  });
}

}  // namespace nvcuda::wmma
