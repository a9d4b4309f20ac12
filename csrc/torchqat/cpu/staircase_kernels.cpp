// Compiled once for each instruction set, see simd.h.
#include "torchqat/cpu/staircase_kernels.h"

#include <algorithm>

#include "torchqat/cpu/simd_exponential.h"
#include "torchqat/cpu/staircase_pieces.h"
#include "torchqat/math/step_codes.h"

namespace torchqat::TORCHQAT_ISA {
namespace {

// What is kept of a group of sixteen elements: nothing, ...
struct NothingKept {
  void write(uint8_t*, int64_t, int64_t) const {}
  template <typename T>
  void put(int, Vec<T>, const math::Staircase<Vec<T>>&) {}
};

// ... the two bits of their regions, which with one bit are their states, ...
struct RegionsKept {
  unsigned low = 0;
  unsigned high = 0;

  static RegionsKept read(const uint8_t* kept, int64_t i, int64_t count) {
    uint32_t bits = 0;
    std::memcpy(&bits, kept + i / 4, math::code_bytes(count, 2));
    const auto even_bytes = [](uint32_t b) { return (b & 0xFFu) | (b >> 8u & 0xFF00u); };
    return {even_bytes(bits), even_bytes(bits >> 8u)};
  }
  void write(uint8_t* kept, int64_t i, int64_t count) const {
    const __m128i bytes = _mm_unpacklo_epi8(_mm_cvtsi32_si128(low), _mm_cvtsi32_si128(high));
    std::memcpy(kept + i / 4, &bytes, math::code_bytes(count, 2));
  }
  template <typename T>
  void put(int lane, Vec<T> x, const math::Staircase<Vec<T>>& stair) {
    const auto bits = stair.region_bits(x);
    low |= to_bits(bits.low) << lane;
    high |= to_bits(bits.high) << lane;
  }
  template <typename T>
  math::RegionBits<Mask<T>> region_bits(int lane, const math::Staircase<Vec<T>>&) const {
    return {from_bits<T>(low >> lane), from_bits<T>(high >> lane)};
  }
  template <typename T>
  Vec<T> level(int lane, const math::Staircase<Vec<T>>& stair) const {
    return math::ByRegion<Vec<T>>{Vec<T>(0), Vec<T>(1), Vec<T>(1)}.at(region_bits<T>(lane, stair));
  }
};

// ... or their states, in four bits, a byte or two.
template <int bits>
struct StatesKept {
  using State = std::conditional_t<bits == 16, uint16_t, uint8_t>;
  State states[kGroup];

  static StatesKept read(const uint8_t* kept, int64_t i, int64_t count) {
    StatesKept group;
    if constexpr (bits == 4) {
      int64_t pairs = 0;
      std::memcpy(&pairs, kept + i / 2, math::code_bytes(count, bits));
      const __m128i both = _mm_cvtsi64_si128(pairs);
      const __m128i four = _mm_set1_epi8(15);
      const __m128i each =
          _mm_unpacklo_epi8(_mm_and_si128(both, four), _mm_and_si128(_mm_srli_epi16(both, 4), four));
      std::memcpy(group.states, &each, sizeof(each));
    } else {
      if (count < kGroup) std::fill_n(group.states, kGroup, State{0});
      std::memcpy(group.states, kept + i * sizeof(State), math::code_bytes(count, bits));
    }
    return group;
  }
  void write(uint8_t* kept, int64_t i, int64_t count) const {
    if constexpr (bits == 4) {
      const auto each = torchqat::TORCHQAT_ISA::read<__m128i>(states);
      const __m128i pairs = _mm_or_si128(_mm_and_si128(each, _mm_set1_epi16(15)), _mm_srli_epi16(each, 4));
      const __m128i both = _mm_packus_epi16(_mm_and_si128(pairs, _mm_set1_epi16(255)), __m128i{});
      std::memcpy(kept + i / 2, &both, math::code_bytes(count, bits));
    } else {
      std::memcpy(kept + i * sizeof(State), states, math::code_bytes(count, bits));
    }
  }
  template <typename T>
  void put(int lane, Vec<T> x, const math::Staircase<Vec<T>>& stair) {
    store(states + lane, stair.state(x));
  }
  template <typename T>
  math::RegionBits<Mask<T>> region_bits(int lane, const math::Staircase<Vec<T>>& stair) const {
    return stair.region_bits_of_state(load_codes<T>(states + lane));
  }
  template <typename T>
  Vec<T> level(int lane, const math::Staircase<Vec<T>>& stair) const {
    return stair.level_of_state(load_codes<T>(states + lane));
  }
};

template <int bits>
using KeptIn = std::conditional_t<bits == math::kRegionBits, RegionsKept, StatesKept<bits>>;

template <typename Kept, typename S, typename Piece>
Kept forward_group(const S* x, S* y, const Piece& piece, int64_t place) {
  using V = Vec<OpMath<S>>;
  Kept kept;
  for (int lane = 0; lane < kGroup; lane += V::size) {
    const V v = load(x + lane);
    const auto& stair = piece.at(place + lane);
    store(y + lane, stair(v));
    kept.put(lane, v, stair);
  }
  return kept;
}

template <typename Kept, typename S, typename T>
TORCHQAT_ALL_INLINE void forward_keeping(const S* x, S* y, uint8_t* kept, const StepSizes<T>& steps,
                                         int64_t begin, int64_t end) {
  for_each_piece(steps, begin, end, [=](int64_t first, int64_t last, const auto& piece) {
    int64_t i = first;
    for (; i + kGroup <= last; i += kGroup) {
      forward_group<Kept, S>(x + i, y + i, piece, i - first).write(kept, i, kGroup);
    }
    if (i == last) return;
    const Padded<S> in(x + i, last - i);
    S out[kGroup];
    forward_group<Kept, S>(in, out, piece, i - first).write(kept, i, last - i);
    std::copy_n(out, last - i, y + i);
  });
}

template <typename S, typename T>
void forward(const S* x, S* y, uint8_t* kept, int kept_bits, const StepSizes<T>& steps, int64_t begin,
             int64_t end) {
  if (kept_bits == 0) return forward_keeping<NothingKept>(x, y, kept, steps, begin, end);
  math::with_code_bits(kept_bits,
                       [&](auto bits) { forward_keeping<KeptIn<bits>>(x, y, kept, steps, begin, end); });
}

template <typename Kept, typename S, typename T>
TORCHQAT_ALL_INLINE void rebuild_from(const uint8_t* kept, S* y, const StepSizes<T>& steps, int64_t begin,
                                      int64_t end) {
  for_each_piece(steps, begin, end, [=](int64_t first, int64_t last, const auto& piece) {
    int64_t i = first;
    const auto group = [&](const Kept& states, S* to) {
      for (int lane = 0; lane < kGroup; lane += Vec<T>::size) {
        const math::Staircase<Vec<T>>& stair = piece.at(i - first + lane);
        store(to + lane, stair.value(states.template level<T>(lane, stair)));
      }
    };
    for (; i + kGroup <= last; i += kGroup) group(Kept::read(kept, i, kGroup), y + i);
    if (i == last) return;
    S out[kGroup];
    group(Kept::read(kept, i, last - i), out);
    std::copy_n(out, last - i, y + i);
  });
}

template <typename S, typename T>
void rebuild(const uint8_t* kept, int kept_bits, S* y, const StepSizes<T>& steps, int64_t begin,
             int64_t end) {
  math::with_code_bits(kept_bits, [&](auto bits) { rebuild_from<KeptIn<bits>>(kept, y, steps, begin, end); });
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

// What backward reads besides the gradient: what forward kept, ...
template <typename Kept, typename T>
struct FromKept {
  const uint8_t* kept;
  math::RegionBackward<Vec<T>> slopes;
  bool exact;

  Kept group(int64_t i) const { return Kept::read(kept, i, kGroup); }
  Kept last_group(int64_t i, int64_t count) const { return Kept::read(kept, i, count); }
  auto operator()(Vec<T> grad, const Kept& group, int lane, const math::Staircase<Vec<T>>& stair) const {
    const auto bits = group.template region_bits<T>(lane, stair);
    if (!exact) return slopes(grad, bits);
    auto with_level = slopes;
    with_level.alpha.inside = group.template level<T>(lane, stair);
    return with_level(grad, bits);
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
TORCHQAT_ALL_INLINE void backward_from(const S* grad, const Kept& kept, S* grad_x, double* alpha_sums,
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
void backward(const S* grad, const uint8_t* kept, int kept_bits, S* grad_x, double* alpha_sums,
              const math::RegionBackward<T>& slopes, bool exact, const StepSizes<T>& steps, int64_t begin,
              int64_t end) {
  const auto& [x, alpha] = slopes;
  const math::RegionBackward<Vec<T>> wide{{x.below, x.inside, x.above},
                                          {alpha.below, alpha.inside, alpha.above}};
  math::with_code_bits(kept_bits, [&](auto bits) {
    const FromKept<KeptIn<bits>, T> from{kept, wide, exact};
    backward_from(grad, from, grad_x, alpha_sums, steps, begin, end);
  });
}

template <typename Ste, typename S, typename T>
void backward_from_x(const S* grad, const S* x, S* grad_x, double* alpha_sums, const math::AlphaSlope& slope,
                     const StepSizes<T>& steps, int64_t begin, int64_t end) {
  backward_from(grad, FromX<Ste, S>{x, {slope}}, grad_x, alpha_sums, steps, begin, end);
}

}  // namespace

template <typename S, typename T>
const StaircaseKernels<S, T>& staircase_kernels() {
  static constexpr auto kernels = std::apply(
      [](auto... ste) {
        return StaircaseKernels<S, T>{forward<S, T>,
                                      codes<S, T>,
                                      rebuild<S, T>,
                                      backward<S, T>,
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
