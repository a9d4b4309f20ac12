// Compiled once for each instruction set, see simd.h.
#include "torchqat/cpu/staircase_kernels.h"

#include <algorithm>

#include "torchqat/cpu/simd_exponential.h"
#include "torchqat/cpu/staircase_pieces.h"
#include "torchqat/math/region_code.h"

namespace torchqat::TORCHQAT_ISA {
namespace {

// The two bits of the regions of a group.
struct GroupRegions {
  unsigned low = 0;
  unsigned high = 0;

  // From and to the words of `count` elements.
  static GroupRegions read(const uint16_t* words, int64_t count) {
    uint32_t bits = 0;
    std::memcpy(&bits, words, math::region_words(count) * sizeof(uint16_t));
    const auto even_bytes = [](uint32_t b) { return (b & 0xFFu) | (b >> 8u & 0xFF00u); };
    return {even_bytes(bits), even_bytes(bits >> 8u)};
  }
  void write(uint16_t* words, int64_t count) const {
    const __m128i bytes = _mm_unpacklo_epi8(_mm_cvtsi32_si128(low), _mm_cvtsi32_si128(high));
    std::memcpy(words, &bytes, math::region_words(count) * sizeof(uint16_t));
  }
};

template <typename S, typename Piece>
GroupRegions forward_group(const S* x, S* y, const Piece& piece, int64_t place) {
  using V = Vec<OpMath<S>>;
  GroupRegions regions;
  for (int lane = 0; lane < kGroup; lane += V::size) {
    const V v = load(x + lane);
    const auto& stair = piece.at(place + lane);
    store(y + lane, stair(v));
    const auto bits = stair.region_bits(v);
    regions.low |= to_bits(bits.low) << lane;
    regions.high |= to_bits(bits.high) << lane;
  }
  return regions;
}

template <typename S, typename T>
TORCHQAT_ALL_INLINE void forward(const S* x, S* y, uint16_t* words, const StepSizes<T>& steps, int64_t begin,
                                 int64_t end) {
  for_each_piece(steps, begin, end, [=](int64_t first, int64_t last, const auto& piece) {
    int64_t i = first;
    if (words != nullptr) {
      for (; i + kGroup <= last; i += kGroup) {
        const auto regions = forward_group<S>(x + i, y + i, piece, i - first);
        regions.write(words + i / math::kRegionsPerWord, kGroup);
      }
    } else {
      for (; i + kGroup <= last; i += kGroup) forward_group<S>(x + i, y + i, piece, i - first);
    }
    if (i == last) return;
    const Padded<S> in(x + i, last - i);
    S out[kGroup];
    const auto regions = forward_group<S>(in, out, piece, i - first);
    std::copy_n(out, last - i, y + i);
    if (words != nullptr) regions.write(words + i / math::kRegionsPerWord, last - i);
  });
}

template <typename S, typename T>
TORCHQAT_ALL_INLINE void codes(const S* x, uint8_t* codes, const StepSizes<T>& steps, int64_t begin,
                               int64_t end) {
  for_each_piece(steps, begin, end, [=](int64_t first, int64_t last, const auto& piece) {
    int64_t i = first;
    const auto group = [&](const S* from, uint8_t* to) {
      for (int lane = 0; lane < kGroup; lane += Vec<T>::size) {
        store(to + lane, piece.at(i - first + lane).code(load(from + lane)));
      }
    };
    for (; i + kGroup <= last; i += kGroup) group(x + i, codes + i);
    if (i == last) return;
    const Padded<S> in(x + i, last - i);
    uint8_t out[kGroup];
    group(in, out);
    std::copy_n(out, last - i, codes + i);
  });
}

// What backward reads besides the gradient: the regions, ...
template <typename T>
struct FromRegions {
  const uint16_t* words;
  math::RegionBackward<Vec<T>> slopes;

  GroupRegions group(int64_t i) const { return last_group(i, kGroup); }
  GroupRegions last_group(int64_t i, int64_t count) const {
    return GroupRegions::read(words + i / math::kRegionsPerWord, count);
  }
  auto operator()(Vec<T> grad, GroupRegions group, int lane, const math::Staircase<Vec<T>>&) const {
    const math::RegionBits<Mask<T>> bits{from_bits<T>(group.low >> lane), from_bits<T>(group.high >> lane)};
    return slopes(grad, bits);
  }
};

// ... or x.
template <typename Ste, typename S>
struct FromX {
  using T = OpMath<S>;
  const S* x;
  math::ValueBackward<Ste, Vec<T>> slopes;

  const S* group(int64_t i) const { return x + i; }
  Padded<S> last_group(int64_t i, int64_t count) const { return {x + i, count}; }
  auto operator()(Vec<T> grad, const S* group, int lane, const math::Staircase<Vec<T>>& stair) const {
    return slopes(grad, load(group + lane), stair);
  }
};

template <typename S, typename T, typename Kept>
TORCHQAT_ALL_INLINE void backward(const S* grad, const Kept& kept, S* grad_x, double* alpha_sums,
                                  const StepSizes<T>& steps, int64_t begin, int64_t end) {
  for_each_piece(steps, begin, end, [=](int64_t first, int64_t last, const auto& piece) {
    int64_t i = first;
    typename std::remove_cvref_t<decltype(piece)>::Sums sums;
    const auto group = [&](const S* from, S* to, const auto& of_group) {
      for (int lane = 0; lane < kGroup; lane += Vec<T>::size) {
        const int64_t place = i - first + lane;
        const auto d = kept(load(from + lane), of_group, lane, piece.at(place));
        store(to + lane, d.x);
        sums.add(piece, place, lane, d.alpha, alpha_sums);
      }
    };
    for (; i + kGroup <= last; i += kGroup) group(grad + i, grad_x + i, kept.group(i));
    if (i < last) {
      const Padded<S> in(grad + i, last - i);
      S out[kGroup];
      group(in, out, kept.last_group(i, last - i));
      std::copy_n(out, last - i, grad_x + i);
    }
    sums.finish(piece, alpha_sums);
  });
}

template <typename S, typename T>
void backward_from_regions(const S* grad, const uint16_t* words, S* grad_x, double* alpha_sums,
                           const math::RegionBackward<T>& slopes, const StepSizes<T>& steps, int64_t begin,
                           int64_t end) {
  const auto& [x, alpha] = slopes;
  const math::RegionBackward<Vec<T>> wide{{x.below, x.inside, x.above},
                                          {alpha.below, alpha.inside, alpha.above}};
  backward(grad, FromRegions<T>{words, wide}, grad_x, alpha_sums, steps, begin, end);
}

template <typename Ste, typename S, typename T>
void backward_from_x(const S* grad, const S* x, S* grad_x, double* alpha_sums, const math::AlphaSlope& slope,
                     const StepSizes<T>& steps, int64_t begin, int64_t end) {
  backward(grad, FromX<Ste, S>{x, {slope}}, grad_x, alpha_sums, steps, begin, end);
}

}  // namespace

template <typename S, typename T>
const StaircaseKernels<S, T>& staircase_kernels() {
  static constexpr auto kernels = std::apply(
      [](auto... ste) {
        return StaircaseKernels<S, T>{forward<S, T>,
                                      codes<S, T>,
                                      backward_from_regions<S, T>,
                                      {backward_from_x<decltype(ste), S, T>...}};
      },
      math::SteCatalogue{});
  return kernels;
}

template const StaircaseKernels<float, float>& staircase_kernels();
template const StaircaseKernels<double, double>& staircase_kernels();
template const StaircaseKernels<c10::Half, float>& staircase_kernels();
template const StaircaseKernels<c10::BFloat16, float>& staircase_kernels();

}  // namespace torchqat::TORCHQAT_ISA
