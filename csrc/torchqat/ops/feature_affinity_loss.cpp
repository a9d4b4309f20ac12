#include "torchqat/ops/feature_affinity_loss.h"

#include <ATen/OpMathType.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "torchqat/math/feature_affinity.h"
#include "torchqat/ops/autograd_node.h"
#include "torchqat/ops/dtypes.h"
#include "torchqat/ops/feature_affinity_loss_device.h"

namespace torchqat {
namespace {

void check_features(std::string_view op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_TYPE(t.defined(), op, ": ", name, " must be of type Tensor, got None");
  TORCH_CHECK_TYPE(t.layout() == at::kStrided, op, ": ", name, " must be a dense tensor, got layout ",
                   t.layout());
  TORCH_CHECK_TYPE(is_supported(t.scalar_type()), op, ": ", name, " must be ", kSupportedDtypes, ", got ",
                   t.scalar_type());
  TORCH_CHECK_VALUE(t.dim() >= 3, op, ": ", name, " must have shape (batch, channels, *spatial), got ",
                    t.sym_sizes());
  for (int64_t d = 1; d < t.dim(); ++d) {
    TORCH_CHECK_VALUE(t.sym_size(d) > 0, op, ": ", name, " must have channels and pixels, got shape ",
                      t.sym_sizes());
  }
}

void check(std::string_view op, const at::Tensor& student, const at::Tensor& teacher, std::string_view norm,
           std::string_view reduction, double eps) {
  check_features(op, "student", student);
  check_features(op, "teacher", teacher);
  TORCH_CHECK_VALUE(teacher.device() == student.device(), op, ": teacher must be on the device of student, ",
                    student.device(), ", got ", teacher.device());
  TORCH_CHECK_VALUE(teacher.sym_size(0) == student.sym_size(0), op,
                    ": teacher must have the batch size of student, ", student.sym_size(0), ", got ",
                    teacher.sym_size(0));
  TORCH_CHECK_VALUE(teacher.sym_sizes().slice(2) == student.sym_sizes().slice(2), op,
                    ": teacher must have the spatial shape of student, ", student.sym_sizes().slice(2),
                    ", got ", teacher.sym_sizes().slice(2));
  TORCH_CHECK_VALUE(norm == "l1" || norm == "fro", op, ": norm must be l1 or fro, got ", norm);
  TORCH_CHECK_VALUE(reduction == "mean" || reduction == "sum", op, ": reduction must be mean or sum, got ",
                    reduction);
  TORCH_CHECK_VALUE(eps >= 0 && std::isfinite(eps), op, ": eps must be finite and >= 0, got ", eps);
}

void check_probes(std::string_view op, const at::Tensor& student, const at::Tensor& probes) {
  TORCH_CHECK_TYPE(probes.defined(), op, ": probes must be of type Tensor, got None");
  TORCH_CHECK_TYPE(probes.layout() == at::kStrided, op, ": probes must be a dense tensor, got layout ",
                   probes.layout());
  TORCH_CHECK_TYPE(is_supported(probes.scalar_type()), op, ": probes must be ", kSupportedDtypes, ", got ",
                   probes.scalar_type());
  TORCH_CHECK_VALUE(probes.device() == student.device(), op, ": probes must be on the device of student, ",
                    student.device(), ", got ", probes.device());
  c10::SymInt pixels = 1;
  for (int64_t d = 2; d < student.dim(); ++d) pixels *= student.sym_size(d);
  TORCH_CHECK_VALUE(probes.dim() == 2 && probes.sym_size(0) == pixels && probes.sym_size(1) > 0, op,
                    ": probes must have shape (", pixels, ", k), a row for each pixel, got ",
                    probes.sym_sizes());
}

at::Tensor empty_loss(const at::Tensor& student, const at::Tensor& teacher) {
  const bool wide = student.scalar_type() == at::kDouble || teacher.scalar_type() == at::kDouble;
  return at::empty({}, student.options().dtype(wide ? at::kDouble : at::kFloat));
}

// Typed handles into the dispatcher.
template <typename F>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

auto exact_op() {
  static const auto op = find<decltype(feature_affinity_loss_meta)>("qat::feature_affinity_loss");
  return op;
}
auto exact_with_gradient_op() {
  static const auto op = find<decltype(feature_affinity_with_gradient_meta)>("qat::_feature_affinity_loss");
  return op;
}
auto fast_op() {
  static const auto op = find<decltype(fast_feature_affinity_loss_meta)>("qat::fast_feature_affinity_loss");
  return op;
}
auto fast_with_gradient_op() {
  static const auto op =
      find<decltype(fast_feature_affinity_with_gradient_meta)>("qat::_fast_feature_affinity_loss");
  return op;
}

at::Tensor empty_gradient(const at::Tensor& student) {
  return at::empty_like(student, student.options().dtype(at::toOpMathType(student.scalar_type())));
}

at::Tensor scaled_gradient_meta(const at::Tensor& /*grad*/, const at::Tensor& gradient,
                                at::ScalarType dtype) {
  return at::empty_like(gradient, gradient.options().dtype(dtype));
}

// The gradient in the features, of their dtype, from that in the loss and what forward kept.
at::Tensor scaled_gradient(const at::Tensor& grad, const at::Tensor& gradient, at::ScalarType dtype) {
  auto result = at::empty_like(gradient, gradient.options().dtype(dtype));
  return at::mul_out(result, gradient, grad);
}

auto scaled_gradient_op() {
  static const auto op = find<decltype(scaled_gradient_meta)>("qat::_feature_affinity_backward");
  return op;
}

struct FeatureAffinityBackward : torch::autograd::Node {
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    torch::autograd::variable_list result(2);
    if (!grads[0].defined()) return result;
    for (size_t i : {0, 1}) {
      if (!task_should_compute_output(i)) continue;
      const auto gradient = gradients[i].unpack();
      at::AutoDispatchBelowADInplaceOrView below_autograd;
      result[i] = scaled_gradient_op().call(grads[0], gradient, dtypes[i]);
    }
    if (at::GradMode::is_enabled()) {
      auto inputs = next_edges();
      inputs.push_back(torch::autograd::impl::gradient_edge(grads[0]));
      refuse_second_derivative(op, result, std::move(inputs));
    }
    return result;
  }
  void release_variables() override {
    for (auto& gradient : gradients) gradient.reset_data();
  }
  std::string name() const override { return "FeatureAffinityBackward"; }
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const auto& gradient : gradients) args.collect(gradient, /*is_output=*/false);
    for (const auto dtype : dtypes) args.collect(dtype);
    args.collect(op);
  }
  torch::autograd::variable_list apply_with_saved(
      const torch::autograd::variable_list& grads,
      torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (auto& gradient : gradients) swap.before(gradient);
    auto result = apply(torch::autograd::variable_list(grads));
    for (auto& gradient : gradients) swap.after(gradient);
    return result;
  }

  std::array<torch::autograd::SavedVariable, 2> gradients;  // of student and teacher
  std::array<at::ScalarType, 2> dtypes{};
  std::string op;
};

// `loss(s, t)` is the operator, `with_gradient(s, t)` its private half; the loss is symmetric in s and t, so
// that the same half gives the gradient of the teacher where one wants it.
template <typename Loss, typename WithGradient>
at::Tensor differentiable(std::string_view op, const at::Tensor& student, const at::Tensor& teacher,
                          Loss&& loss, WithGradient&& with_gradient) {
  TORCH_CHECK_NOT_IMPLEMENTED(!has_tangent(student) && !has_tangent(teacher), op,
                              ": forward-mode derivatives (jvp) are not implemented; use reverse mode");
  const bool enabled = at::GradMode::is_enabled();
  const bool of_student = enabled && student.requires_grad();
  const bool of_teacher = enabled && teacher.requires_grad();
  at::Tensor value;
  std::array<at::Tensor, 2> gradients;
  {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    if (of_teacher) std::tie(value, gradients[1]) = with_gradient(teacher, student);
    if (of_student) std::tie(value, gradients[0]) = with_gradient(student, teacher);
    if (!value.defined()) value = loss(student, teacher);
  }
  if (!of_student && !of_teacher) return value;
  auto node = make_node<FeatureAffinityBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(student, teacher));
  for (size_t i : {0, 1}) {
    node->gradients[i] = torch::autograd::SavedVariable(gradients[i], /*is_output=*/false);
  }
  node->dtypes = {student.scalar_type(), teacher.scalar_type()};
  node->op = op;
  torch::autograd::set_history(value, node);
  return value;
}

at::Tensor feature_affinity_loss_autograd(const at::Tensor& student, const at::Tensor& teacher,
                                          std::string_view norm, std::string_view reduction, double eps) {
  check("feature_affinity_loss", student, teacher, norm, reduction, eps);
  return differentiable(
      "feature_affinity_loss", student, teacher,
      [&](const auto& s, const auto& t) { return exact_op().call(s, t, norm, reduction, eps); },
      [&](const auto& s, const auto& t) {
        return exact_with_gradient_op().call(s, t, norm, reduction, eps);
      });
}

at::Tensor fast_feature_affinity_loss_autograd(const at::Tensor& student, const at::Tensor& teacher,
                                               const at::Tensor& probes, std::string_view norm,
                                               std::string_view reduction, double eps) {
  constexpr std::string_view op = "fast_feature_affinity_loss";
  check(op, student, teacher, norm, reduction, eps);
  check_probes(op, student, probes);
  TORCH_CHECK_VALUE(!(at::GradMode::is_enabled() && probes.requires_grad()) && !has_tangent(probes), op,
                    ": probes must not require a gradient; detach them");
  return differentiable(
      op, student, teacher,
      [&](const auto& s, const auto& t) { return fast_op().call(s, t, probes, norm, reduction, eps); },
      [&](const auto& s, const auto& t) {
        return fast_with_gradient_op().call(s, t, probes, norm, reduction, eps);
      });
}

}  // namespace

at::Tensor feature_affinity_loss_meta(const at::Tensor& student, const at::Tensor& teacher,
                                      std::string_view norm, std::string_view reduction, double eps) {
  check("feature_affinity_loss", student, teacher, norm, reduction, eps);
  return empty_loss(student, teacher);
}

at::Tensor fast_feature_affinity_loss_meta(const at::Tensor& student, const at::Tensor& teacher,
                                           const at::Tensor& probes, std::string_view norm,
                                           std::string_view reduction, double eps) {
  check("fast_feature_affinity_loss", student, teacher, norm, reduction, eps);
  check_probes("fast_feature_affinity_loss", student, probes);
  return empty_loss(student, teacher);
}

std::tuple<at::Tensor, at::Tensor> feature_affinity_with_gradient_meta(const at::Tensor& student,
                                                                       const at::Tensor& teacher,
                                                                       std::string_view norm,
                                                                       std::string_view reduction,
                                                                       double eps) {
  return {feature_affinity_loss_meta(student, teacher, norm, reduction, eps), empty_gradient(student)};
}

std::tuple<at::Tensor, at::Tensor> fast_feature_affinity_with_gradient_meta(
    const at::Tensor& student, const at::Tensor& teacher, const at::Tensor& probes, std::string_view norm,
    std::string_view reduction, double eps) {
  return {fast_feature_affinity_loss_meta(student, teacher, probes, norm, reduction, eps),
          empty_gradient(student)};
}

at::Tensor feature_affinity_loss(const at::Tensor& student, const at::Tensor& teacher, std::string_view norm,
                                 std::string_view reduction, double eps) {
  return exact_op().call(student, teacher, norm, reduction, eps);
}

at::Tensor fast_feature_affinity_loss(const at::Tensor& student, const at::Tensor& teacher,
                                      const at::Tensor& probes, std::string_view norm,
                                      std::string_view reduction, double eps) {
  return fast_op().call(student, teacher, probes, norm, reduction, eps);
}

std::string recommend_feature_affinity(int64_t student_channels, int64_t teacher_channels, int64_t pixels,
                                       int64_t probes) {
  TORCH_CHECK_VALUE(student_channels > 0 && teacher_channels > 0 && pixels > 0 && probes > 0,
                    "recommend_feature_affinity: channels, pixels and probes must be > 0, got ",
                    student_channels, ", ", teacher_channels, ", ", pixels, " and ", probes);
  const auto flops = math::affinity_flops(student_channels, teacher_channels, pixels, probes);
  return flops.fast < std::min(flops.direct, flops.gram) ? "fast" : "exact";
}

TORCH_LIBRARY_IMPL(qat, Autograd, m) {
  m.impl("feature_affinity_loss", feature_affinity_loss_autograd);
  m.impl("fast_feature_affinity_loss", fast_feature_affinity_loss_autograd);
  m.impl("_feature_affinity_loss", torch::autograd::autogradNotImplementedFallback());
  m.impl("_fast_feature_affinity_loss", torch::autograd::autogradNotImplementedFallback());
  m.impl("_feature_affinity_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(qat, CompositeExplicitAutograd, m) {
  m.impl("_feature_affinity_backward", scaled_gradient);
}

TORCH_LIBRARY_IMPL(qat, Meta, m) {
  m.impl("feature_affinity_loss", feature_affinity_loss_meta);
  m.impl("fast_feature_affinity_loss", fast_feature_affinity_loss_meta);
  m.impl("_feature_affinity_loss", feature_affinity_with_gradient_meta);
  m.impl("_fast_feature_affinity_loss", fast_feature_affinity_with_gradient_meta);
  m.impl("_feature_affinity_backward", scaled_gradient_meta);
}

}  // namespace torchqat
