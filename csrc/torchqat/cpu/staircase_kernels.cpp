// Compiled once for each instruction set, see simd.h.
#include "torchqat/cpu/staircase_kernels.h"

#include <algorithm>

#include "torchqat/cpu/simd.h"
#include "torchqat/cpu/simd_exponential.h"
#include "torchqat/math/region_code.h"

namespace torchqat::TORCHQAT_ISA {
namespace {

// Elements that are taken together: a vector of floats, and whole words of regions.
constexpr int kGroup = std::max(Vec<float>::size, math::kRegionsPerWord);

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

// The staircases of a piece of memory, by the place in it, and what the piece adds to the sums of channels.
// A piece that lies in one channel, ...
template <typename T>
struct OneChannel {
  const math::Staircase<Vec<T>> stair;
  const int64_t channel;

  const auto& at(int64_t) const { return stair; }

  struct Sums {
    LaneSums lanes;
    void add(const OneChannel&, int64_t, int lane, Vec<T> v, double*) { lanes.add(lane, v); }
    void finish(const OneChannel& piece, double* sums) const { sums[piece.channel] += lanes.total(); }
  };
};

// ... one whose elements belong to channels that follow one another, ...
template <typename T>
struct ChannelRow {
  const T* alpha;  // of the first
  const int64_t channel;
  const int64_t bits;

  auto at(int64_t place) const { return math::Staircase<Vec<T>>(load(alpha + place), bits); }

  struct Sums {
    void add(const ChannelRow& piece, int64_t place, int, Vec<T> v, double* sums) {
      add_lanes(sums + piece.channel + place, v);
    }
    void finish(const ChannelRow&, double*) const {}
  };
};

// ... and a group of any channels.
template <typename T>
struct MixedLanes {
  T alpha[kGroup];
  int64_t channel[kGroup];
  int64_t bits;

  auto at(int64_t place) const { return math::Staircase<Vec<T>>(load(alpha + place), bits); }

  struct Sums {
    double lanes[kGroup] = {};
    void add(const MixedLanes&, int64_t, int lane, Vec<T> v, double*) { add_lanes(lanes + lane, v); }
    void finish(const MixedLanes& piece, double* sums) const {
      for (int i = 0; i < kGroup; ++i) sums[piece.channel[i]] += lanes[i];
    }
  };
};

// Where an element's channel changes.
struct ChannelWalk {
  const math::ChannelView view;
  int64_t channel;
  int64_t left;  // elements of the channel's run, at least one

  ChannelWalk(const math::ChannelView& v, int64_t position)
      : view(v), channel(position / v.inner % v.channels), left(v.inner - position % v.inner) {}
  void pass(int64_t count) {
    left -= count;
    if (left > 0) return;
    left = view.inner;
    channel = channel + 1 == view.channels ? 0 : channel + 1;
  }
};

// Calls f(first, last, piece) for pieces of [begin, end) that follow one another, each beginning at a
// multiple of eight.
template <typename T, typename F>
void for_each_piece(const StepSizes<T>& steps, int64_t begin, int64_t end, F&& f) {
  const auto one_channel = [&](int64_t c) { return OneChannel<T>{{Vec<T>(steps.alpha[c]), steps.bits}, c}; };
  if (steps.view.channels == 1) return f(begin, end, one_channel(0));
  ChannelWalk walk(steps.view, begin);
  for (int64_t first = begin; first < end;) {
    const bool is_row = steps.view.inner == 1;
    const int64_t alike = is_row ? steps.view.channels - walk.channel : walk.left;
    const int64_t whole = std::min(alike, end - first) / kGroup * kGroup;
    const int64_t next = std::min(end, first + std::max<int64_t>(whole, kGroup));
    if (whole > 0 && is_row) {
      f(first, next, ChannelRow<T>{steps.alpha + walk.channel, walk.channel, steps.bits});
      walk.channel += whole - 1;
      walk.pass(1);
    } else if (whole > 0) {
      f(first, next, one_channel(walk.channel));
      walk.pass(whole);
    } else {
      MixedLanes<T> lanes{{}, {}, steps.bits};
      for (int i = 0; i < kGroup; ++i) {
        lanes.channel[i] = walk.channel;
        lanes.alpha[i] = steps.alpha[walk.channel];
        walk.pass(1);
      }
      f(first, next, lanes);
    }
    first = next;
  }
}

// A group; what is past `count` is 0.
template <typename S>
struct Padded {
  S values[kGroup] = {};

  Padded(const S* from, int64_t count) { std::copy_n(from, count, values); }
  operator const S*() const { return values; }
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
