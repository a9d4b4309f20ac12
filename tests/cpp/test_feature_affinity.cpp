// The feature affinity losses as modules. Numbers are those of the operators, which test_ops.cpp holds to the
// oracles.
#include <torch/nn/modules/container/sequential.h>
#include <torch/serialize.h>
#include <torchqat/torchqat.h>

#include <sstream>

#include "torch_checks.h"

namespace {

using torchqat::nn::FastFeatureAffinityLoss;
using torchqat::nn::FastFeatureAffinityLossOptions;
using torchqat::nn::FeatureAffinityLoss;
using torchqat::nn::FeatureAffinityLossOptions;

struct Features : ::testing::Test {
  void SetUp() override { at::manual_seed(0); }
  at::Tensor student = at::randn({2, 5, 6, 7}).requires_grad_();
  at::Tensor teacher = at::randn({2, 3, 6, 7});
};

TEST_F(Features, ModuleIsTheOperator) {
  FeatureAffinityLoss loss;
  EXPECT_TRUE(at::equal(loss(student, teacher), torchqat::feature_affinity_loss(student, teacher)));
  FeatureAffinityLoss other(FeatureAffinityLossOptions().norm("fro").reduction("sum").eps(0.1));
  const auto value = other(student, teacher);
  EXPECT_TRUE(at::equal(value, torchqat::feature_affinity_loss(student, teacher, "fro", "sum", 0.1)));
  EXPECT_FALSE(at::equal(value, loss(student, teacher)));
  value.backward();
  EXPECT_GT(student.grad().norm().item<double>(), 0);
}

TEST_F(Features, FastModuleDrawsNewProbesFromAGeneratorOfItsOwn) {
  const auto global = at::detail::getDefaultCPUGenerator().get_state();
  FastFeatureAffinityLoss loss(FastFeatureAffinityLossOptions().probes(4).norm("fro"));
  const auto first = loss(student, teacher);
  const auto second = loss(student, teacher);
  EXPECT_FALSE(at::equal(first, second));
  EXPECT_TRUE(at::equal(global, at::detail::getDefaultCPUGenerator().get_state()));
  FastFeatureAffinityLoss again(FastFeatureAffinityLossOptions().probes(4).norm("fro"));
  EXPECT_TRUE(at::equal(again(student, teacher), first));
  auto generator = at::detail::createCPUGenerator(7);
  const auto probes = at::randn({42, 4}, at::detail::createCPUGenerator(7));
  FastFeatureAffinityLoss shared(FastFeatureAffinityLossOptions().probes(4).generator(generator));
  EXPECT_TRUE(
      at::equal(shared(student, teacher), torchqat::fast_feature_affinity_loss(student, teacher, probes)));
}

TEST_F(Features, RademacherProbesAreSigns) {
  FastFeatureAffinityLoss loss(FastFeatureAffinityLossOptions().distribution("rademacher"));
  const auto probes = loss->draw(100, at::kCPU, at::kDouble);
  EXPECT_EQ(probes.sizes(), at::IntArrayRef({100, 15}));
  EXPECT_EQ(probes.scalar_type(), at::kDouble);
  EXPECT_TRUE(probes.abs().eq(1).all().item<bool>());
  EXPECT_LT(probes.mean().abs().item<double>(), 0.1);
}

TEST_F(Features, FastModuleGoesOnFromItsSavedState) {
  FastFeatureAffinityLoss loss;
  loss(student, teacher);
  std::stringstream file;
  torch::save(loss, file);
  const auto copy = std::dynamic_pointer_cast<torchqat::nn::FastFeatureAffinityLossImpl>(loss->clone());
  const auto next = loss(student, teacher);
  FastFeatureAffinityLoss loaded;
  torch::load(loaded, file);
  EXPECT_TRUE(at::equal(loaded(student, teacher), next));
  EXPECT_TRUE(at::equal(copy->forward(student, teacher), next));  // not moved on by the original
}

TEST_F(Features, OptionsArePrinted) {
  std::stringstream text;
  text << FeatureAffinityLoss() << FastFeatureAffinityLoss(FastFeatureAffinityLossOptions().probes(3));
  EXPECT_EQ(text.str(),
            "torchqat::nn::FeatureAffinityLoss(norm=l1, reduction=mean, eps=1e-05)"
            "torchqat::nn::FastFeatureAffinityLoss(probes=3, norm=l1, reduction=mean, eps=1e-05, "
            "distribution=gaussian)");
}

TEST_F(Features, WrongOptionsAndFeaturesAreNamed) {
  EXPECT_EQ(error_of([] { FeatureAffinityLoss(FeatureAffinityLossOptions().norm("l2")); }),
            "feature_affinity_loss: norm must be l1 or fro, got l2");
  EXPECT_EQ(error_of([] { FastFeatureAffinityLoss(FastFeatureAffinityLossOptions().eps(-1)); }),
            "feature_affinity_loss: eps must be finite and >= 0, got -1");
  EXPECT_EQ(error_of([] { FastFeatureAffinityLoss(FastFeatureAffinityLossOptions().probes(0)); }),
            "FastFeatureAffinityLoss: probes must be at least 1, got 0");
  EXPECT_EQ(
      error_of([] { FastFeatureAffinityLoss(FastFeatureAffinityLossOptions().distribution("cauchy")); }),
      "FastFeatureAffinityLoss: unknown distribution 'cauchy'; choose one of gaussian, rademacher");
  FastFeatureAffinityLoss fast;
  const auto before = fast->generator.get_state();
  EXPECT_EQ(error_of([&] { fast(student.flatten(1), teacher); }),
            "feature_affinity_loss: student must have shape (batch, channels, *spatial), got [2, 210]");
  EXPECT_TRUE(at::equal(fast->generator.get_state(), before));
}

}  // namespace
