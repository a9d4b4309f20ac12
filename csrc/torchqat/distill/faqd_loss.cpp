#include "torchqat/distill/faqd_loss.h"

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

#include "torchqat/ops/feature_affinity_loss.h"

namespace torchqat::distill {
namespace {

// Beyond them float32 keeps few digits of the divergence, a difference of numbers that are nearly the same.
constexpr double kMinTemperature = 0.01;
constexpr double kMaxTemperature = 100;

void check(const FAQDLossOptions& options) {
  const auto is_weight = [](const char* name, double value) {
    TORCH_CHECK_VALUE(value >= 0 && std::isfinite(value), "faqd_loss: ", name,
                      " must be a finite number >= 0, got ", value);
  };
  is_weight("lambda_kd", options.lambda_kd());
  is_weight("lambda_fa", options.lambda_fa());
  is_weight("lambda_label", options.lambda_label());
  TORCH_CHECK_VALUE(options.lambda_kd() || options.lambda_fa() || options.lambda_label(),
                    "faqd_loss: one of lambda_kd, lambda_fa, lambda_label must be > 0, got 0 for all");
  TORCH_CHECK_VALUE(options.kd() == "mse" || options.kd() == "kl", "faqd_loss: unknown kd '", options.kd(),
                    "'; choose one of mse, kl");
  TORCH_CHECK_VALUE(options.temperature() >= kMinTemperature && options.temperature() <= kMaxTemperature,
                    "faqd_loss: temperature must be a number from ", kMinTemperature, " to ", kMaxTemperature,
                    ", got ", options.temperature());
}

// Logits in at least float32.
at::Tensor wide(const char* name, const at::Tensor& logits) {
  TORCH_CHECK_TYPE(logits.defined() && logits.is_floating_point(), "faqd_loss: ", name,
                   " must be of a floating dtype, got ",
                   logits.defined() ? c10::toString(logits.scalar_type()) : "none");
  TORCH_CHECK_VALUE(logits.dim() >= 2, "faqd_loss: ", name, " must have shape (batch, classes, *), got ",
                    logits.sizes());
  return logits.scalar_type() == at::kDouble ? logits : logits.to(at::kFloat);
}

at::Tensor distance(const at::Tensor& student, const at::Tensor& teacher, const FAQDLossOptions& options) {
  TORCH_CHECK_VALUE(student.sizes() == teacher.sizes(),
                    "faqd_loss: student and teacher must have logits of one shape, got ", student.sizes(),
                    " and ", teacher.sizes());
  if (options.kd() == "mse") return at::mse_loss(student, teacher);
  const double t = options.temperature();
  const auto log_student = at::log_softmax(student / t, 1);
  auto log_teacher = at::log_softmax(teacher / t, 1);
  const double least = log_teacher.scalar_type() == at::kDouble ? std::numeric_limits<double>::lowest()
                                                                : std::numeric_limits<float>::lowest();
  log_teacher = log_teacher.clamp_min(least);  // -inf * 0 would be NaN
  return t * t * at::kl_div(log_student, log_teacher, at::Reduction::None, /*log_target=*/true).sum(1).mean();
}

at::Tensor affinity(const std::vector<std::pair<at::Tensor, at::Tensor>>& features,
                    const FAQDLossOptions& options) {
  TORCH_CHECK_VALUE(!features.empty(),
                    "faqd_loss: features must hold at least one pair where lambda_fa > 0, got none; "
                    "lambda_fa=0 does without");
  at::Tensor sum;
  for (size_t pair = 0; pair < features.size(); ++pair) {
    const auto& [student, teacher] = features[pair];
    at::Tensor loss;
    try {
      loss = options.fa() ? options.fa()(student, teacher) : feature_affinity_loss(student, teacher);
    } catch (c10::Error& error) {
      error.add_context(c10::str("in pair ", pair, " of features"));
      throw;
    }
    TORCH_CHECK_VALUE(loss.dim() == 0, "faqd_loss: fa must return a 0-dim loss, got shape ", loss.sizes());
    sum = sum.defined() ? sum + loss : loss;
  }
  return sum;
}

}  // namespace

FAQDTerms faqd_loss(const at::Tensor& student_logits, const at::Tensor& teacher_logits,
                    const std::vector<std::pair<at::Tensor, at::Tensor>>& features, const at::Tensor& labels,
                    const FAQDLossOptions& options) {
  check(options);
  const auto student = wide("student_logits", student_logits);
  FAQDTerms terms;
  const auto add = [&](double weight, const at::Tensor& term) {
    const auto weighted = term * weight;
    terms.loss = terms.loss.defined() ? terms.loss + weighted : weighted;
    return term.detach();
  };
  if (options.lambda_kd())
    terms.kd = add(options.lambda_kd(), distance(student, wide("teacher_logits", teacher_logits), options));
  if (options.lambda_fa()) terms.fa = add(options.lambda_fa(), affinity(features, options));
  if (options.lambda_label()) {
    TORCH_CHECK_VALUE(labels.defined(),
                      "faqd_loss: labels must be given where lambda_label > 0, got none; lambda_label=0 "
                      "trains without");
    terms.label = add(options.lambda_label(), at::cross_entropy_loss(student, labels));
  }
  return terms;
}

at::Tensor resize_like(const at::Tensor& features, const at::Tensor& like, bool align_corners) {
  TORCH_CHECK_TYPE(features.defined() && like.defined(), "resize_like: features and like must be tensors");
  const int64_t rank = features.dim() - 2;
  const bool comparable = features.dim() == like.dim() && rank >= 1 && rank <= 3;
  if (features.dim() >= 2 && like.dim() >= 2 && features.sizes().slice(2) == like.sizes().slice(2))
    return features;
  TORCH_CHECK_VALUE(comparable,
                    "resize_like: features must have shape (B, C, *spatial) with as many spatial dimensions, "
                    "1 to 3, as those they are fitted to, got ",
                    features.sizes(), " and ", like.sizes());
  const auto size = like.sizes().slice(2);
  if (rank == 1) return at::upsample_linear1d(features, size, align_corners);
  if (rank == 2) return at::upsample_bilinear2d(features, size, align_corners);
  return at::upsample_trilinear3d(features, size, align_corners);
}

}  // namespace torchqat::distill
