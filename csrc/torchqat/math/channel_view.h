#pragma once

#include <cstdint>

#include "torchqat/math/macros.h"

namespace torchqat::math {

// In the memory of a dense tensor each channel owns runs of `inner` consecutive elements, and the channels
// follow one another: contiguous NCHW has inner = H * W, channels-last inner = 1; per tensor is one channel.
struct ChannelView {
  int64_t channels;
  int64_t inner;

  TORCHQAT_HD int64_t channel_at(int64_t position) const {
    return channels == 1 ? 0 : position / inner % channels;
  }

  // Memory position of the j-th element of a channel.
  TORCHQAT_HD int64_t position(int64_t channel, int64_t j) const {
    return channels == 1 ? j : (j / inner * channels + channel) * inner + j % inner;
  }
};

}  // namespace torchqat::math
