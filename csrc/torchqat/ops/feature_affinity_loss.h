#pragma once

#include <ATen/ATen.h>

#include <string>
#include <string_view>

#include "torchqat/macros.h"

namespace torchqat {

// How differently the student and the teacher see which pixels are alike. Features have the shape (batch,
// channels, *spatial), with channels of their own; with unit columns a = f / (|f| + eps) for every pixel and
// S = A'A - B'B, the loss is the sum of |S_ij| over i != j ("l1") or of S_ij^2 ("fro"), divided by the square
// of the number of pixels, and the mean or the sum over the batch. 0-dim, float32 (float64 where an input
// is).
TORCHQAT_API at::Tensor feature_affinity_loss(const at::Tensor& student, const at::Tensor& teacher,
                                              std::string_view norm = "l1",
                                              std::string_view reduction = "mean", double eps = 1e-5);

// An estimate by random probes, (pixels, k): the mean over their columns v of the sum of |Sv| ("l1") or of
// (Sv)^2 ("fro"). With "fro" its expectation is feature_affinity_loss.
TORCHQAT_API at::Tensor fast_feature_affinity_loss(const at::Tensor& student, const at::Tensor& teacher,
                                                   const at::Tensor& probes, std::string_view norm = "l1",
                                                   std::string_view reduction = "mean", double eps = 1e-5);

// "exact" or "fast": which of the two losses takes fewer operations with norm "fro", forward and backward,
// for features of so many channels and pixels.
TORCHQAT_API std::string recommend_feature_affinity(int64_t student_channels, int64_t teacher_channels,
                                                    int64_t pixels, int64_t probes = 15);

}  // namespace torchqat
