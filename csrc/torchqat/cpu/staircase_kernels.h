#pragma once

#include <cstdint>
#include <tuple>

#include "torchqat/cpu/instruction_set.h"
#include "torchqat/math/channel_view.h"
#include "torchqat/math/staircase_backward.h"

// The loops of staircase_relu over raw memory, for one thread: elements [begin, end) of dense tensors in one
// memory order, where begin is a multiple of eight. S is the dtype, T its op-math type.
namespace torchqat {

// The step size of each element.
template <typename T>
struct StepSizes {
  const T* alpha;  // one for each channel
  math::ChannelView view;
  int64_t bits;
};

template <typename S, typename T>
struct StaircaseKernels {
  // y = the staircase of x; in `kept`, with kept_bits of 2 the packed regions, with 4, 8 or 16 the states
  // (math/step_codes.h), with 0 nothing.
  void (*forward)(const S* x, S* y, uint8_t* kept, int kept_bits, const StepSizes<T>& steps, int64_t begin,
                  int64_t end);
  // The step indices.
  void (*codes)(const S* x, uint8_t* codes, const StepSizes<T>& steps, int64_t begin, int64_t end);
  // y once more, from its packed states.
  void (*rebuild)(const uint8_t* kept, int kept_bits, S* y, const StepSizes<T>& steps, int64_t begin,
                  int64_t end);
  // The gradient in x, and that in each channel's alpha added to alpha_sums; from what forward left in
  // `kept` ...
  void (*backward)(const S* grad, const uint8_t* kept, int kept_bits, S* grad_x, double* alpha_sums,
                   const math::RegionBackward<T>& slopes, bool exact, const StepSizes<T>& steps,
                   int64_t begin, int64_t end);
  // ... and from x, for each of math::SteCatalogue.
  using BackwardFromX = void (*)(const S* grad, const S* x, S* grad_x, double* alpha_sums,
                                 const math::AlphaSlope& slope, const StepSizes<T>& steps, int64_t begin,
                                 int64_t end);
  BackwardFromX backward_from_x[std::tuple_size_v<math::SteCatalogue>];
};

#define DECLARE(isa)                                 \
  namespace isa {                                    \
  template <typename S, typename T>                  \
  const StaircaseKernels<S, T>& staircase_kernels(); \
  }
TORCHQAT_FOR_EACH_ISA(DECLARE)
#undef DECLARE

}  // namespace torchqat
