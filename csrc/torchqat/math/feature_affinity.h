#pragma once

#include "torchqat/math/select.h"

// Feature affinity: Li, Yang, Yin, Qi, Xin, "Feature affinity assisted knowledge distillation and
// quantization of deep neural networks on label-free data", 2023. The features of a pixel are a column,
// columns are brought to unit length, and S = A'A - B'B compares which pixels are alike to the student (A)
// and to the teacher (B).
namespace torchqat::math {

// A column f of norm n and its unit column a = f / (n + eps). A column of zeros stays zeros and has no
// gradient, where the formula alone would blow it up by 1 / eps.
template <typename T>
struct UnitColumn {
  T norm;
  T eps;

  // What f is multiplied by.
  TORCHQAT_HD T scale() const { return where(norm == T(0), T(0), T(1) / (norm + eps)); }
  // The gradient of an element f of the column from that of a, where `dot` is the product of the column and
  // the gradient of a.
  TORCHQAT_HD T gradient(T grad, T f, T dot) const {
    const T radial = where(norm == T(0), T(0), dot / (norm * (norm + eps)));
    return (grad - f * radial) * scale();
  }
};

template <typename T>
TORCHQAT_HD T magnitude(T s) {
  return where(s < T(0), -s, s);
}
// 1, -1, or what is neither: 0 and NaN.
template <typename T>
TORCHQAT_HD T sign(T s) {
  return where(s > T(0), T(1), where(s < T(0), T(-1), s));
}

// Floating-point operations for an image, forward and backward together, of the forms that the squared
// Frobenius norm of S has.
struct AffinityFlops {
  double direct;  // S itself, pixels x pixels
  double gram;    // by the Gram matrices of channels: |S|^2 = |AA'|^2 + |BB'|^2 - 2 |AB'|^2
  double fast;    // S times random probes, an estimate
};

inline AffinityFlops affinity_flops(double student, double teacher, double pixels, double probes) {
  const double both = student + teacher;
  return {2 * pixels * pixels * (both + student),
          2 * pixels * (student * both + teacher * teacher + student * both),
          2 * pixels * probes * (2 * both + 3 * student)};
}

}  // namespace torchqat::math
