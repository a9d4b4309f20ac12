#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <optional>

#include "torchqat/math/channel_view.h"

namespace torchqat {

// True when both place the same number of elements in memory in the same order. Strides of dimensions of size
// 1 say nothing.
inline bool same_layout(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

// t with its elements in the memory order of the dense tensor `like`; t itself where it already has it.
inline at::Tensor laid_out_as(const at::Tensor& t, const at::Tensor& like) {
  if (same_layout(t, like)) return t;
  return at::empty_strided(like.sizes(), like.strides(), t.options()).copy_(t);
}

// How channels alternate along the memory of a dense, non-overlapping tensor of any stride order.
inline math::ChannelView channel_view(const at::Tensor& dense, std::optional<int64_t> channel_dim) {
  const int64_t n = dense.numel();
  if (!channel_dim || n == 0 || dense.size(*channel_dim) == 1) return {1, std::max<int64_t>(n, 1)};
  return {dense.size(*channel_dim), dense.stride(*channel_dim)};
}

}  // namespace torchqat
