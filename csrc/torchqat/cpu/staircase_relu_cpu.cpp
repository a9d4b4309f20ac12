#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "torchqat/math/region_code.h"
#include "torchqat/math/staircase_backward.h"
#include "torchqat/ops/layout.h"
#include "torchqat/ops/staircase_relu.h"
#include "torchqat/ops/ste.h"

namespace torchqat {
namespace {

using math::ChannelView;
using math::Region;
using math::Staircase;

// Elements whose regions are held unpacked at a time; a multiple of the eight that share a word.
constexpr int64_t kTile = 1024;

template <typename opmath_t>
std::vector<Staircase<opmath_t>> staircases(const at::Tensor& alpha, int64_t bits) {
  const auto steps = alpha.to(c10::CppTypeToScalarType<opmath_t>::value).contiguous();
  const auto* step = steps.template const_data_ptr<opmath_t>();
  std::vector<Staircase<opmath_t>> result;
  result.reserve(steps.numel());
  for (int64_t c = 0; c < steps.numel(); ++c) result.emplace_back(step[c], bits);
  return result;
}

// Calls f(first, last, channel) for the runs of one channel that make up the elements [begin, end).
template <typename F>
void for_each_run(const ChannelView& view, int64_t begin, int64_t end, F&& f) {
  int64_t run = begin / view.inner;
  int64_t channel = run % view.channels;
  for (int64_t first = begin; first < end; ++run) {
    const int64_t last = std::min(end, (run + 1) * view.inner);
    f(first, last, channel);
    first = last;
    channel = channel + 1 == view.channels ? 0 : channel + 1;
  }
}

// Calls f(i, staircase of element i) over all elements, in parallel.
template <typename opmath_t, typename F>
void for_each_element(int64_t n, const ChannelView& view, const std::vector<Staircase<opmath_t>>& stairs,
                      F&& f) {
  at::parallel_for(0, n, at::internal::GRAIN_SIZE, [&](int64_t begin, int64_t end) {
    for_each_run(view, begin, end, [&](int64_t first, int64_t last, int64_t channel) {
      const auto stair = stairs[channel];
      for (int64_t i = first; i < last; ++i) f(i, stair);
    });
  });
}

// Between eight regions, a byte each, and the word that holds them; eight at a time, by multiplication and by
// table.
uint16_t pack_word(const Region* regions) {
  uint64_t bytes;
  std::memcpy(&bytes, regions, sizeof(bytes));
  const auto gather = [](uint64_t low_bits) { return low_bits * 0x0102040810204080U >> 56; };
  return static_cast<uint16_t>(gather(bytes & 0x0101010101010101U) | gather(bytes >> 1 & 0x0101010101010101U)
                                                                         << 8);
}

constexpr auto kSpread = [] {
  std::array<uint64_t, 256> spread{};
  for (uint64_t byte = 0; byte < 256; ++byte) {
    for (int i = 0; i < 8; ++i) spread[byte] |= (byte >> i & 1) << (8 * i);
  }
  return spread;
}();

void unpack_word(uint16_t word, Region* regions) {
  const uint64_t bytes = kSpread[word & 0xFF] | kSpread[word >> 8] << 1;
  std::memcpy(regions, &bytes, sizeof(bytes));
}

// A tile's regions; what lies past the last element in the last word is 0.
void pack(Region* tile, int64_t count, uint16_t* words) {
  const int64_t padded = math::region_words(count) * math::kRegionsPerWord;
  std::fill(tile + count, tile + padded, Region::below);
  for (int64_t w = 0; w * math::kRegionsPerWord < count; ++w)
    words[w] = pack_word(tile + w * math::kRegionsPerWord);
}

void unpack(const uint16_t* words, int64_t count, Region* tile) {
  for (int64_t w = 0; w * math::kRegionsPerWord < count; ++w)
    unpack_word(words[w], tile + w * math::kRegionsPerWord);
}

// In eight fixed lanes, which is what lets the compiler use vectors.
template <typename T>
double sum(const T* values, int64_t count) {
  double lane[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int k = 0; k < 8; ++k) lane[k] += static_cast<double>(values[i + k]);
  }
  for (; i < count; ++i) lane[i % 8] += static_cast<double>(values[i]);
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

at::Tensor forward(const at::Tensor& x, const at::Tensor& alpha, int64_t bits, std::string_view ste,
                   std::string_view alpha_grad, int64_t channel_dim) {
  auto y = staircase_relu_meta(x, alpha, bits, ste, alpha_grad, channel_dim);
  const auto in = laid_out_as(x, y);
  const auto view = channel_view(y, alpha_channel_dim(x, alpha, channel_dim));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "staircase_relu_cpu", [&] {
    using opmath_t = at::opmath_type<scalar_t>;
    const auto* src = in.const_data_ptr<scalar_t>();
    auto* dst = y.mutable_data_ptr<scalar_t>();
    for_each_element(y.numel(), view, staircases<opmath_t>(alpha, bits), [=](int64_t i, const auto& stair) {
      dst[i] = static_cast<scalar_t>(stair(static_cast<opmath_t>(src[i])));
    });
  });
  return y;
}

at::Tensor codes(const at::Tensor& x, const at::Tensor& alpha, int64_t bits, int64_t channel_dim) {
  auto k = staircase_codes_meta(x, alpha, bits, channel_dim);
  const auto in = laid_out_as(x, k);
  const auto view = channel_view(k, alpha_channel_dim(x, alpha, channel_dim));
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "staircase_codes_cpu", [&] {
    using opmath_t = at::opmath_type<scalar_t>;
    const auto* src = in.const_data_ptr<scalar_t>();
    auto* dst = k.mutable_data_ptr<uint8_t>();
    for_each_element(k.numel(), view, staircases<opmath_t>(alpha, bits), [=](int64_t i, const auto& stair) {
      dst[i] = stair.code(static_cast<opmath_t>(src[i]));
    });
  });
  return k;
}

std::tuple<at::Tensor, at::Tensor> forward_with_regions(const at::Tensor& x, const at::Tensor& alpha,
                                                        int64_t bits, int64_t channel_dim) {
  auto [y, regions] = staircase_relu_forward_meta(x, alpha, bits, channel_dim);
  const auto in = laid_out_as(x, y);
  const auto view = channel_view(y, alpha_channel_dim(x, alpha, channel_dim));
  auto* words = reinterpret_cast<uint16_t*>(regions.mutable_data_ptr<uint8_t>());
  const int64_t n = y.numel();
  const auto dtype = x.scalar_type();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "staircase_relu_cpu", [&, y = y] {
    using opmath_t = at::opmath_type<scalar_t>;
    const auto* src = in.const_data_ptr<scalar_t>();
    auto* dst = y.mutable_data_ptr<scalar_t>();
    const auto stairs = staircases<opmath_t>(alpha, bits);
    const int64_t tiles = at::divup(n, kTile);
    at::parallel_for(0, tiles, at::divup(at::internal::GRAIN_SIZE, kTile), [&](int64_t from, int64_t to) {
      Region tile[kTile];
      for (int64_t begin = from * kTile; begin < std::min(n, to * kTile); begin += kTile) {
        const int64_t end = std::min(n, begin + kTile);
        for_each_run(view, begin, end, [&](int64_t first, int64_t last, int64_t channel) {
          const auto stair = stairs[channel];
          for (int64_t i = first; i < last; ++i) {
            const auto v = static_cast<opmath_t>(src[i]);
            dst[i] = static_cast<scalar_t>(stair(v));
            tile[i - begin] = stair.region(v);
          }
        });
        pack(tile, end - begin, words + begin / math::kRegionsPerWord);
      }
    });
  });
  return {y, regions};
}

// grad_x, and grad_alpha summed in an order that the shapes alone fix: chunks of a set size, float64 across
// elements. `tile_grads(begin, end)` prepares a tile and returns a function of (incoming gradient, element,
// channel).
template <typename scalar_t, typename TileGrads>
void backward_loop(const scalar_t* grad, scalar_t* grad_x, const at::Tensor& grad_alpha, int64_t n,
                   const ChannelView& view, TileGrads&& tile_grads) {
  using opmath_t = at::opmath_type<scalar_t>;
  const int64_t chunk =
      at::divup(std::max<int64_t>(at::internal::GRAIN_SIZE, 8 * view.channels), kTile) * kTile;
  const int64_t chunks = at::divup(n, chunk);
  auto partial = at::zeros({chunks, view.channels}, at::kDouble);
  auto* sums = partial.mutable_data_ptr<double>();
  at::parallel_for(0, chunks, 1, [&](int64_t from, int64_t to) {
    opmath_t terms[kTile];
    Region regions[kTile];
    for (int64_t begin = from * chunk; begin < std::min(n, to * chunk); begin += kTile) {
      auto* const chunk_sums = sums + begin / chunk * view.channels;
      const int64_t end = std::min(n, begin + kTile);
      const auto element_grad = tile_grads(begin, end, regions);
      for_each_run(view, begin, end, [&](int64_t first, int64_t last, int64_t channel) {
        for (int64_t i = first; i < last; ++i) {
          const auto g = element_grad(static_cast<opmath_t>(grad[i]), i, channel);
          grad_x[i] = static_cast<scalar_t>(g.x);
          terms[i - begin] = g.alpha;
        }
        chunk_sums[channel] += sum(terms + (first - begin), last - first);
      });
    }
  });
  auto total = at::zeros({view.channels}, at::kDouble);
  auto* totals = total.mutable_data_ptr<double>();
  for (int64_t k = 0; k < chunks; ++k) {
    for (int64_t c = 0; c < view.channels; ++c) totals[c] += sums[k * view.channels + c];
  }
  // A channel view merges the channels of a dimension of size 1, and of an empty tensor.
  grad_alpha.copy_(total.numel() == grad_alpha.numel() ? total.view_as(grad_alpha)
                                                       : total.expand_as(grad_alpha));
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& saved,
                                            const at::Tensor& alpha, c10::SymIntArrayRef size,
                                            c10::SymIntArrayRef stride, int64_t bits, std::string_view ste,
                                            std::string_view alpha_grad, int64_t channel_dim) {
  auto [grad_x, grad_alpha] =
      staircase_relu_backward_meta(grad, saved, alpha, size, stride, bits, ste, alpha_grad, channel_dim);
  const auto upstream = laid_out_as(grad, grad_x);
  const auto view = channel_view(grad_x, alpha_channel_dim(grad, alpha, channel_dim));
  const bool from_regions = saved.scalar_type() == at::kByte;
  const auto kept = from_regions ? saved : laid_out_as(saved, grad_x);
  const auto slope = alpha_slope(alpha_grad, bits);
  const auto dtype = grad.scalar_type();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, dtype, "staircase_relu_cpu", [&, grad_x = grad_x, grad_alpha = grad_alpha] {
        using opmath_t = at::opmath_type<scalar_t>;
        const auto* g = upstream.const_data_ptr<scalar_t>();
        auto* out = grad_x.mutable_data_ptr<scalar_t>();
        with_ste(ste, [&]<typename Ste>(Ste) {
          if (from_regions) {
            const auto* words = reinterpret_cast<const uint16_t*>(kept.const_data_ptr<uint8_t>());
            const auto grads = math::region_backward<opmath_t, Ste>(slope);
            backward_loop(g, out, grad_alpha, grad.numel(), view,
                          [&](int64_t begin, int64_t end, Region* tile) {
                            unpack(words + begin / math::kRegionsPerWord, end - begin, tile);
                            return [=](opmath_t v, int64_t i, int64_t) { return grads(v, tile[i - begin]); };
                          });
          } else {
            const auto* x = kept.const_data_ptr<scalar_t>();
            const auto stairs = staircases<opmath_t>(alpha, bits);
            const math::ValueBackward<Ste, opmath_t> at_x{slope};
            backward_loop(g, out, grad_alpha, grad.numel(), view, [&](int64_t, int64_t, Region*) {
              return [&](opmath_t v, int64_t i, int64_t channel) {
                return at_x(v, static_cast<opmath_t>(x[i]), stairs[channel]);
              };
            });
          }
        });
      });
  return {grad_x, grad_alpha};
}

}  // namespace

TORCH_LIBRARY_IMPL(qat, CPU, m) {
  m.impl("staircase_relu", forward);
  m.impl("staircase_codes", codes);
  m.impl("_staircase_relu_forward", forward_with_regions);
  m.impl("_staircase_relu_backward", backward);
}

}  // namespace torchqat
