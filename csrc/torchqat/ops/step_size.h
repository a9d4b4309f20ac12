#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace torchqat {

// The step size of a staircase that fits observed activations best, from counts of their magnitudes, whose
// memory does not grow with the data: what `calibrate` is made of, in C++ and in Python.

// [channels, bins], int64, zeros. Bins are 0.05 % wide, 0.4 % where there are several channels.
at::Tensor empty_magnitude_counts(int64_t channels);

// Counts the positive elements of x; its dimension 1 is the channel where there are several.
void count_magnitudes(const at::Tensor& x, const at::Tensor& counts);

// For each channel the step size of least squared error; NaN where nothing was positive.
std::vector<double> best_step_sizes(const at::Tensor& counts, int64_t bits);

}  // namespace torchqat
