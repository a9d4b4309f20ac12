#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <string_view>

// The matrix products of feature affinity that are the same on every device. They see the unit columns of
// some images in blocks of pixels, so that what they hold does not grow with the pixels. Everything is
// float64: close to the teacher the loss is a small difference of large numbers, and float32 has lost it at a
// relative distance of 1e-3.
namespace torchqat {

struct AffinityColumns {
  int64_t student_channels;
  int64_t teacher_channels;
  int64_t pixels;
  // The columns of `count` pixels from `first` on: (images, student's channels, then teacher's, count).
  std::function<at::Tensor(int64_t first, int64_t count)> block;
  // Takes the gradient in the student's columns from pixel `first` on, of the block that was made last, of
  // `piece` pixels at most. Empty where none is wanted.
  std::function<void(int64_t first, const at::Tensor& gradient)> take_gradient;
  int64_t piece;
};

// |S|^2 of each image, (images). Takes S itself or the Gram matrices, whichever needs fewer operations
// (math::affinity_flops); S itself in one block.
at::Tensor frobenius_affinity(const AffinityColumns& columns);

// The mean over the columns v of `probes` (pixels, k), float64, of |Sv|^2 ("fro") or of the sum of |Sv|
// ("l1").
at::Tensor fast_affinity(const AffinityColumns& columns, const at::Tensor& probes, std::string_view norm);

// Pixels in the largest block that they ask for; `probes` is 0 for frobenius_affinity.
int64_t affinity_block(int64_t student_channels, int64_t teacher_channels, int64_t pixels, int64_t probes);

// Numbers that they hold for an image at most, the gradient of a block and its columns included.
int64_t affinity_scratch(int64_t student_channels, int64_t teacher_channels, int64_t pixels, int64_t probes);

}  // namespace torchqat
