#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>
#include <tuple>

// The operators of the feature affinity losses from what a device has to compute.
namespace torchqat {

// Check the arguments and allocate the loss; every backend calls them first, and they are the Meta kernels.
at::Tensor feature_affinity_loss_meta(const at::Tensor& student, const at::Tensor& teacher,
                                      std::string_view norm, std::string_view reduction, double eps);
at::Tensor fast_feature_affinity_loss_meta(const at::Tensor& student, const at::Tensor& teacher,
                                           const at::Tensor& probes, std::string_view norm,
                                           std::string_view reduction, double eps);

// The private halves of the differentiable operators: the loss, and its gradient in the student. That is
// float32 where the features are of half precision, for which its elements may be too small and too large
// until backward multiplies them.
std::tuple<at::Tensor, at::Tensor> feature_affinity_with_gradient_meta(const at::Tensor& student,
                                                                       const at::Tensor& teacher,
                                                                       std::string_view norm,
                                                                       std::string_view reduction,
                                                                       double eps);
std::tuple<at::Tensor, at::Tensor> fast_feature_affinity_with_gradient_meta(
    const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& probes, std::string_view norm,
    std::string_view reduction, double eps);

// The images' values, (batch) in float64, whose sum times `weight` is the loss, of `dtype`. Where `gradient`
// is defined, the gradient of the loss in the student goes there.
using ExactAffinity = at::Tensor(const at::Tensor& student, const at::Tensor& teacher, std::string_view norm,
                                 double eps, double weight, const at::Tensor& gradient, at::ScalarType dtype);
using FastAffinity = at::Tensor(const at::Tensor& student, const at::Tensor& teacher,
                                const at::Tensor& probes, std::string_view norm, double eps, double weight,
                                const at::Tensor& gradient);

// Features as (batch, channels, pixels), in place where their strides allow it.
inline at::Tensor as_columns(const at::Tensor& features) { return features.flatten(2); }

// One over pixels^2, and over the batch for its mean.
inline double weight_of(const at::Tensor& student, std::string_view reduction) {
  const auto pixels = static_cast<double>(c10::multiply_integers(student.sizes().slice(2)));
  return 1 / (pixels * pixels * (reduction == "mean" ? std::max<int64_t>(student.size(0), 1) : 1));
}

inline at::Tensor weighted_sum(const at::Tensor& values, double weight, at::ScalarType dtype) {
  return values.sum().mul_(weight).to(dtype);
}

template <ExactAffinity exact>
struct ExactOperators {
  static at::Tensor loss(const at::Tensor& student, const at::Tensor& teacher, std::string_view norm,
                         std::string_view reduction, double eps) {
    const auto dtype = feature_affinity_loss_meta(student, teacher, norm, reduction, eps).scalar_type();
    const double weight = weight_of(student, reduction);
    return weighted_sum(exact(student, teacher, norm, eps, weight, {}, dtype), weight, dtype);
  }
  static std::tuple<at::Tensor, at::Tensor> with_gradient(const at::Tensor& student,
                                                          const at::Tensor& teacher, std::string_view norm,
                                                          std::string_view reduction, double eps) {
    auto [loss, gradient] = feature_affinity_with_gradient_meta(student, teacher, norm, reduction, eps);
    const double weight = weight_of(student, reduction);
    const auto values = exact(student, teacher, norm, eps, weight, gradient, loss.scalar_type());
    return {weighted_sum(values, weight, loss.scalar_type()), gradient};
  }
};

template <FastAffinity fast>
struct FastOperators {
  static at::Tensor loss(const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& probes,
                         std::string_view norm, std::string_view reduction, double eps) {
    const auto loss = fast_feature_affinity_loss_meta(student, teacher, probes, norm, reduction, eps);
    const double weight = weight_of(student, reduction);
    const auto values = fast(student, teacher, probes, norm, eps, weight, {});
    return weighted_sum(values, weight, loss.scalar_type());
  }
  static std::tuple<at::Tensor, at::Tensor> with_gradient(const at::Tensor& student,
                                                          const at::Tensor& teacher, const at::Tensor& probes,
                                                          std::string_view norm, std::string_view reduction,
                                                          double eps) {
    auto [loss, gradient] =
        fast_feature_affinity_with_gradient_meta(student, teacher, probes, norm, reduction, eps);
    const double weight = weight_of(student, reduction);
    const auto values = fast(student, teacher, probes, norm, eps, weight, gradient);
    return {weighted_sum(values, weight, loss.scalar_type()), gradient};
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
