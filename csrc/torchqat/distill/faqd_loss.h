#pragma once

#include <ATen/core/Tensor.h>
#include <torch/arg.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "torchqat/macros.h"

namespace torchqat::distill {

// The loss of one pair of features, student's and teacher's.
using FeatureLoss = std::function<at::Tensor(const at::Tensor& student, const at::Tensor& teacher)>;

struct TORCHQAT_API FAQDLossOptions {
  TORCH_ARG(double, lambda_kd) = 1.0;     // weight of the logits' term,
  TORCH_ARG(double, lambda_fa) = 10.0;    // of the features' term,
  TORCH_ARG(double, lambda_label) = 0.3;  // of the cross entropy with the labels; 0 trains without labels
  TORCH_ARG(std::string, kd) = "mse";     // or "kl"
  TORCH_ARG(double, temperature) = 4.0;   // for "kl" only
  TORCH_ARG(FeatureLoss, fa) = nullptr;   // else feature_affinity_loss; a module of torchqat::nn will do
};

struct FAQDTerms {
  at::Tensor loss;           // the weighted sum, with its gradient
  at::Tensor kd, fa, label;  // the terms without their weights, detached; undefined where the weight is 0
};

// Feature-affinity assisted knowledge distillation (Li, Yang, Yin, Qi, Xin 2023): lambda_kd times the mean
// square of the difference of the logits (B, classes, *) ("mse"), or temperature^2 times the
// Kullback-Leibler divergence of their softmaxes at that temperature ("kl"); plus lambda_fa times the sum
// over `features`, pairs of student's and teacher's on equal grids (resize_like), of their affinity losses;
// plus lambda_label times the cross entropy. A term of weight 0 is not computed, and what belongs to it is
// not looked at.
TORCHQAT_API FAQDTerms faqd_loss(const at::Tensor& student_logits, const at::Tensor& teacher_logits = {},
                                 const std::vector<std::pair<at::Tensor, at::Tensor>>& features = {},
                                 const at::Tensor& labels = {}, const FAQDLossOptions& options = {});

// Features (B, C, *spatial) on the grid of others: linear, bilinear or trilinear interpolation, by the number
// of spatial dimensions; `features` itself where the grids are equal.
TORCHQAT_API at::Tensor resize_like(const at::Tensor& features, const at::Tensor& like,
                                    bool align_corners = true);

}  // namespace torchqat::distill
