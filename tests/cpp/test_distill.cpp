// torchqat::distill against what the oracles computed (tests/write_oracle_values.py), and its errors.
#include <torchqat/torchqat.h>

#include "torch_checks.h"

namespace {

using at::Tensor;
using torchqat::distill::faqd_loss;
using torchqat::distill::FAQDLossOptions;
using torchqat::distill::FAQDTerms;
using torchqat::distill::resize_like;

TEST(Oracles, FaqdLoss) {
  OracleValues values("faqd_loss");
  const std::map<std::string, FAQDLossOptions> cases{
      {"defaults", {}},
      {"kl", FAQDLossOptions().kd("kl").temperature(2).lambda_kd(0.5)},
      {"kd_only", FAQDLossOptions().lambda_fa(0).lambda_label(0)},
      {"fa_only", FAQDLossOptions().lambda_kd(0).lambda_label(0).lambda_fa(2)},
      {"label_only", FAQDLossOptions().lambda_kd(0).lambda_fa(0).lambda_label(0.7)},
  };
  for (const std::string shape : {"flat", "dense"}) {
    for (const auto& [name, options] : cases) {
      for (const auto dtype : {at::kFloat, at::kDouble}) {
        SCOPED_TRACE(c10::str(shape, ".", name, ".", dtype));
        const auto input = [&](const char* key) {
          return values(shape + "." + key).to(dtype).clone().requires_grad_();
        };
        const auto student = input("student");
        const auto map0 = input("map0");
        const auto map2 = input("map2");
        const auto terms =
            faqd_loss(student, input("teacher"), {{map0, input("map1")}, {map2, input("map3")}},
                      values(shape + ".labels"), options);
        const auto expected = [&](const std::string& key) { return values(shape + "." + name + "." + key); };
        EXPECT_TRUE(near(terms.loss, expected("loss")));
        const std::map<std::string, Tensor> parts{{"kd", terms.kd}, {"fa", terms.fa}, {"label", terms.label}};
        for (const auto& [key, term] : parts) {
          EXPECT_EQ(term.defined(), values.has(shape + "." + name + "." + key)) << key;
          if (term.defined()) {
            EXPECT_TRUE(near(term, expected(key)));
            EXPECT_FALSE(term.requires_grad());
          }
        }
        terms.loss.backward();
        const std::vector<Tensor> inputs{student, map0, map2};
        for (size_t i = 0; i < inputs.size(); ++i) {
          const auto& grad = inputs[i].grad();
          EXPECT_TRUE(near(grad.defined() ? grad : at::zeros_like(inputs[i]), expected(c10::str("grad", i))))
              << i;
        }
      }
    }
  }
}

TEST(FaqdLoss, WhatHasNoWeightIsNotLookedAt) {
  const auto student = at::ones({2, 3});
  EXPECT_TRUE(
      faqd_loss(student, student, {}, {}, FAQDLossOptions().lambda_fa(0).lambda_label(0)).loss.defined());
  const auto labels = at::zeros({2}, at::kLong);
  EXPECT_TRUE(faqd_loss(student, {}, {}, labels, FAQDLossOptions().lambda_fa(0).lambda_kd(0)).loss.defined());
}

TEST(FaqdLoss, TakesAnotherFeatureLoss) {
  const auto logits = at::ones({2, 3});
  const auto maps = at::rand({2, 3, 4});
  const auto options = FAQDLossOptions().lambda_kd(0).lambda_label(0).lambda_fa(1);
  const auto with = [&](torchqat::distill::FeatureLoss fa) {
    return faqd_loss(logits, {}, {{maps, maps.flip(0)}}, {}, FAQDLossOptions(options).fa(std::move(fa))).loss;
  };
  torchqat::nn::FastFeatureAffinityLoss fast;
  torchqat::nn::FastFeatureAffinityLoss again;
  EXPECT_TRUE(same(with(fast), again(maps, maps.flip(0))));
  EXPECT_TRUE(same(with([](const Tensor& s, const Tensor& t) { return (s - t).abs().sum(); }),
                   (maps - maps.flip(0)).abs().sum()));
  EXPECT_EQ(error_of([&] { with([](const Tensor& s, const Tensor&) { return s; }); }),
            "faqd_loss: fa must return a 0-dim loss, got shape [2, 3, 4]");
}

TEST(FaqdLoss, NamesWhatIsWrong) {
  const auto logits = at::ones({2, 3});
  const auto refused = [&](const FAQDLossOptions& options) {
    return error_of([&] { faqd_loss(logits, logits, {}, {}, options); });
  };
  EXPECT_EQ(refused(FAQDLossOptions().lambda_kd(-1)),
            "faqd_loss: lambda_kd must be a finite number >= 0, got -1");
  EXPECT_EQ(refused(FAQDLossOptions().lambda_fa(std::nan(""))),
            "faqd_loss: lambda_fa must be a finite number >= 0, got nan");
  EXPECT_EQ(refused(FAQDLossOptions().lambda_label(-2)),
            "faqd_loss: lambda_label must be a finite number >= 0, got -2");
  EXPECT_EQ(refused(FAQDLossOptions().lambda_kd(0).lambda_fa(0).lambda_label(0)),
            "faqd_loss: one of lambda_kd, lambda_fa, lambda_label must be > 0, got 0 for all");
  EXPECT_EQ(refused(FAQDLossOptions().kd("l1")), "faqd_loss: unknown kd 'l1'; choose one of mse, kl");
  EXPECT_EQ(refused(FAQDLossOptions().temperature(0)),
            "faqd_loss: temperature must be a number from 0.01 to 100, got 0");
  EXPECT_EQ(refused({}),
            "faqd_loss: features must hold at least one pair where lambda_fa > 0, got none; lambda_fa=0 "
            "does without");
  EXPECT_EQ(
      refused(FAQDLossOptions().lambda_fa(0)),
      "faqd_loss: labels must be given where lambda_label > 0, got none; lambda_label=0 trains without");
  EXPECT_EQ(error_of([&] {
              faqd_loss(logits, at::ones({2, 4}));
            }),
            "faqd_loss: student and teacher must have logits of one shape, got [2, 3] and [2, 4]");
  EXPECT_EQ(error_of([&] { faqd_loss(at::ones({2}), logits); }),
            "faqd_loss: student_logits must have shape (batch, classes, *), got [2]");
  EXPECT_EQ(error_of<c10::TypeError>([&] { faqd_loss(logits, {}); }),
            "faqd_loss: teacher_logits must be of a floating dtype, got none");
  EXPECT_EQ(error_of<c10::TypeError>([&] { faqd_loss(logits.to(at::kInt), logits); }),
            "faqd_loss: student_logits must be of a floating dtype, got Int");
}

TEST(Oracles, ResizeLike) {
  OracleValues values("resize_like");
  for (const std::string name : {"1d", "2d", "3d"}) {
    const auto& features = values(name + ".features");
    const auto& like = values(name + ".like");
    EXPECT_TRUE(near(resize_like(features, like), values(name + ".True")));
    EXPECT_TRUE(near(resize_like(features, like, false), values(name + ".False")));
    EXPECT_TRUE(resize_like(features, features.slice(0, 0, 1)).is_same(features));
  }
}

TEST(ResizeLike, NamesWhatIsWrong) {
  const std::string error =
      "resize_like: features must have shape (B, C, *spatial) with as many spatial dimensions, 1 to 3, as "
      "those they "
      "are fitted to, got ";
  EXPECT_EQ(error_of([] {
              resize_like(at::ones({1, 2, 3}), at::ones({1, 2, 3, 4}));
            }),
            error + "[1, 2, 3] and [1, 2, 3, 4]");
  EXPECT_EQ(error_of([] { resize_like(at::ones({3}), at::ones({4})); }), error + "[3] and [4]");
  EXPECT_EQ(error_of<c10::TypeError>([] { resize_like({}, at::ones({4})); }),
            "resize_like: features and like must be tensors");
}

}  // namespace
