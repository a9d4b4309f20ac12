#pragma once

#include <ATen/ATen.h>

#include <string_view>

// The matrix products of feature affinity that are the same on every device. `unit` holds the unit columns of
// some images: (images, student's channels, then the teacher's, pixels). Everything is float64: close to the
// teacher the loss is a small difference of large numbers, and float32 has lost it at a relative distance of
// 1e-3.
namespace torchqat {

struct Affinity {
  at::Tensor value;     // of each image, (images), before the division by pixels^2
  at::Tensor gradient;  // in the student's unit columns; undefined unless asked for
};

// |S|^2. Takes S itself or the Gram matrices, whichever needs fewer operations (math::affinity_flops).
Affinity frobenius_affinity(const at::Tensor& unit, int64_t student_channels, bool differentiate);

// The mean over the columns v of `probes` (pixels, k), float64, of |Sv|^2 ("fro") or of the sum of |Sv|
// ("l1").
Affinity fast_affinity(const at::Tensor& unit, int64_t student_channels, const at::Tensor& probes,
                       std::string_view norm, bool differentiate);

}  // namespace torchqat
