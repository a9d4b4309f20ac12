#pragma once

#include <torch/library.h>

#include <tuple>

#include "torchqat/ops/feature_affinity_loss.h"

// The operators of the feature affinity losses from what a device has to compute.
namespace torchqat {

// The images' values, (batch) in float64, before the division by pixels^2. Where `gradient` is defined, the
// gradient of their sum in the student, divided by the number of pixels, goes there. `dtype` is that of the
// loss.
using ExactAffinity = at::Tensor(const at::Tensor& student, const at::Tensor& teacher, std::string_view norm,
                                 double eps, const at::Tensor& gradient, at::ScalarType dtype);
using FastAffinity = at::Tensor(const at::Tensor& student, const at::Tensor& teacher,
                                const at::Tensor& probes, std::string_view norm, double eps,
                                const at::Tensor& gradient);

// Features as (batch, channels, pixels), in place where their strides allow it.
inline at::Tensor as_columns(const at::Tensor& features) { return features.flatten(2); }

inline at::Tensor reduced(const at::Tensor& values, const at::Tensor& student, std::string_view reduction,
                          at::ScalarType dtype) {
  const auto pixels = static_cast<double>(c10::multiply_integers(student.sizes().slice(2)));
  const int64_t terms = reduction == "mean" ? std::max<int64_t>(values.numel(), 1) : 1;
  return values.sum().div_(pixels * pixels * terms).to(dtype);
}

template <ExactAffinity exact>
struct ExactOperators {
  static at::Tensor loss(const at::Tensor& student, const at::Tensor& teacher, std::string_view norm,
                         std::string_view reduction, double eps) {
    const auto dtype = feature_affinity_loss_meta(student, teacher, norm, reduction, eps).scalar_type();
    return reduced(exact(student, teacher, norm, eps, {}, dtype), student, reduction, dtype);
  }
  static std::tuple<at::Tensor, at::Tensor> with_gradient(const at::Tensor& student,
                                                          const at::Tensor& teacher, std::string_view norm,
                                                          std::string_view reduction, double eps) {
    auto [loss, gradient] = feature_affinity_with_gradient_meta(student, teacher, norm, reduction, eps);
    const auto values = exact(student, teacher, norm, eps, gradient, loss.scalar_type());
    return {reduced(values, student, reduction, loss.scalar_type()), gradient};
  }
};

template <FastAffinity fast>
struct FastOperators {
  static at::Tensor loss(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& probes,
                         std::string_view norm, std::string_view reduction, double eps) {
    const auto loss = fast_feature_affinity_loss_meta(student, teacher, probes, norm, reduction, eps);
    return reduced(fast(student, teacher, probes, norm, eps, {}), student, reduction, loss.scalar_type());
  }
  static std::tuple<at::Tensor, at::Tensor> with_gradient(const at::Tensor& student,
                                                          const at::Tensor& teacher, const at::Tensor& probes,
                                                          std::string_view norm, std::string_view reduction,
                                                          double eps) {
    auto [loss, gradient] =
        fast_feature_affinity_with_gradient_meta(student, teacher, probes, norm, reduction, eps);
    const auto values = fast(student, teacher, probes, norm, eps, gradient);
    return {reduced(values, student, reduction, loss.scalar_type()), gradient};
  }
};

template <ExactAffinity exact, FastAffinity fast>
void register_feature_affinity(torch::Library& m) {
  m.impl("feature_affinity_loss", ExactOperators<exact>::loss);
  m.impl("_feature_affinity_loss", ExactOperators<exact>::with_gradient);
  m.impl("fast_feature_affinity_loss", FastOperators<fast>::loss);
  m.impl("_fast_feature_affinity_loss", FastOperators<fast>::with_gradient);
}

}  // namespace torchqat
