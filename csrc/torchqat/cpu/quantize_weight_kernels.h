#pragma once

#include <cstdint>

#include "torchqat/cpu/instruction_set.h"
#include "torchqat/math/weight_method.h"

// The loops of quantize_weight and weight_codes over raw memory, for one thread: n weights in a row that
// share a scale. S is the dtype, T its op-math type.
namespace torchqat {

// How weights get their levels (math::assigned_level).
template <typename T>
struct LevelRule {
  T cut;
  math::WeightMethod method;
  int64_t bits;
};

template <typename S, typename T>
struct QuantizeWeightKernels {
  // Adds their magnitudes to `sums`.
  void (*add_magnitudes)(const S* w, int64_t n, math::MagnitudeSums& sums);
  // Adds their levels to `fit`.
  void (*add_levels)(const S* w, int64_t n, const LevelRule<T>& rule, math::WeightFit& fit);
  // quantized = scale * level.
  void (*quantize)(const S* w, S* quantized, int64_t n, const LevelRule<T>& rule, T scale);
  // The levels themselves.
  void (*codes)(const S* w, int8_t* levels, int64_t n, const LevelRule<T>& rule);
};

#define DECLARE(isa)                                            \
  namespace isa {                                               \
  template <typename S, typename T>                             \
  const QuantizeWeightKernels<S, T>& quantize_weight_kernels(); \
  }
TORCHQAT_FOR_EACH_ISA(DECLARE)
#undef DECLARE

}  // namespace torchqat
