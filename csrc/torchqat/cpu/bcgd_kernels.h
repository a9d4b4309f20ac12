#pragma once

#include <cstdint>

#include "torchqat/cpu/instruction_set.h"
#include "torchqat/math/bcgd.h"
#include "torchqat/math/ternary_near.h"

// The loops of bcgd_step_ over runs of consecutive memory, for one thread. S is the dtype of the parameter, T
// its op-math type, that of all the rest.
namespace torchqat {

template <typename S, typename T>
struct BcgdRun {
  S* w;
  const S* g;
  T* y;
  T* buffer;  // or null
  int64_t count;
};

// What gives magnitudes their levels.
enum class LevelRule { top, kept, nearest };

template <typename T>
struct Levels {
  LevelRule rule;
  T at;  // the threshold, or the step size
  int64_t bits;
};

template <typename S, typename T>
struct BcgdKernels {
  // Make the new y, and add to the sums: those of the top level, ...
  void (*update)(const BcgdRun<S, T>& run, const math::StepRule<T>& rule, bool first,
                 math::StepSums<1>& sums);
  // ... the same for one bit, whose w is not read: it is `scale` with the sign of y; ...
  void (*update_binary)(const BcgdRun<S, T>& run, const math::StepRule<T>& rule, bool first, T scale,
                        math::StepSums<1>& sums);
  // ... or those of the warm start. Where a scale has `few` weights, assignments may be equally good but for
  // rounding, and sums are exact; the roundings of many even out.
  void (*update_warm)(const BcgdRun<S, T>& run, const math::StepRule<T>& rule, bool first,
                      const math::WarmLevel<T> (&levels)[math::kWarmSteps], bool few,
                      math::StepSums<math::kWarmSteps>& sums);
  // ... or those of the ternary search; the magnitudes near the edge go to *near, which moves on, and has
  // room for a group more than the run.
  void (*update_ternary)(const BcgdRun<S, T>& run, const math::StepRule<T>& rule, bool first,
                         const math::TernaryEdges<T>& edges, math::TernarySums& sums, T** near);
  // Adds what is above the window to `above`; what is in it goes to *kept, as with `near`.
  void (*gather)(const T* y, int64_t count, const math::MagnitudeWindow<T>& window, math::WeightFit& above,
                 T** kept);
  void (*fit)(const T* y, int64_t count, const Levels<T>& levels, math::WeightFit& fit);
  // w = scale * level. Past the caches if they will not keep w until it is read: then
  // _mm_sfence() must follow.
  void (*write)(S* w, const T* y, int64_t count, T scale, const Levels<T>& levels, bool past_caches);
};

#define DECLARE(isa)                       \
  namespace isa {                          \
  template <typename S, typename T>        \
  const BcgdKernels<S, T>& bcgd_kernels(); \
  }
TORCHQAT_FOR_EACH_ISA(DECLARE)
#undef DECLARE

}  // namespace torchqat
