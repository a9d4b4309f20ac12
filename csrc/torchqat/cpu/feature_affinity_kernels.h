#pragma once

#include <ATen/OpMathType.h>

#include <cstdint>

#include "torchqat/cpu/instruction_set.h"

// The loops of the feature affinity losses over raw memory, for one thread. S is the dtype of the features, W
// that of the matrix products.
namespace torchqat {

// The features of one image: the element of channel c and pixel p is data[c * channel_stride + p *
// pixel_stride].
template <typename S>
struct Columns {
  S* data;
  int64_t channels;
  int64_t pixels;
  int64_t channel_stride;
  int64_t pixel_stride;
};

template <typename S, typename W>
struct ColumnKernels {
  // The unit columns, as a dense (channels, pixels) matrix, and the columns' norms.
  void (*unit)(const Columns<const S>& features, double eps, W* unit, double* norms);
  // The gradient in the features, times a factor, from that in their unit columns (dense as well).
  void (*gradient)(const W* grad, const Columns<const S>& features, const double* norms, double eps,
                   double factor, const Columns<at::opmath_type<S>>& grad_features);
};

#define DECLARE(isa)                                                            \
  namespace isa {                                                               \
  template <typename S, typename W>                                             \
  const ColumnKernels<S, W>& column_kernels();                                  \
  /* Replaces values by their signs and returns the sum of their magnitudes. */ \
  template <typename W>                                                         \
  double take_signs(W* values, int64_t count);                                  \
  }
TORCHQAT_FOR_EACH_ISA(DECLARE)
#undef DECLARE

}  // namespace torchqat
