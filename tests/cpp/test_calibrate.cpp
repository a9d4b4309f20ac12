// torchqat::calibrate: the step sizes of the oracle, and what it leaves as it was.
#include <torch/data.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torchqat/torchqat.h>

#include <limits>

#include "torch_checks.h"

namespace {

using at::Tensor;
using torch::nn::Sequential;
using torchqat::calibrate;
using torchqat::nn::StaircaseReLU;
using torchqat::nn::StaircaseReLUOptions;

// The mean squared error of a staircase, channel by channel where it has several.
Tensor error_of_steps(StaircaseReLU& module, const Tensor& x) {
  const torch::NoGradGuard no_grad;
  const auto square = (module(x) - x.relu()).to(at::kDouble).square();
  return module->alpha.dim() == 0 ? square.mean() : square.mean({0});
}

// The histogram has bins as wide as 2^-11 of their values, 2^-8 with channels; near the best step size the
// error is flat, and may have a second least value that is as good.
TEST(Oracles, CalibratedStepSizes) {
  OracleValues values("calibrate");
  const auto batches = values("batches").unbind();
  const auto all = values("batches").flatten(0, 1);
  for (const int64_t bits : {1, 2, 4, 8}) {
    for (const std::string kind : {"scalar", "channels"}) {
      SCOPED_TRACE(c10::str(bits, ".", kind));
      StaircaseReLUOptions options(bits);
      if (kind == "channels") options.channels(3);
      StaircaseReLU module(options.alpha_min(1e-6));
      calibrate(module, batches);
      const auto least = values(c10::str(bits, ".", kind, ".error"));
      EXPECT_TRUE(error_of_steps(module, all).le(least * (kind == "scalar" ? 1.01 : 1.05)).all().item<bool>())
          << error_of_steps(module, all) << " " << least;
      EXPECT_TRUE(
          near(module->alpha, values(c10::str(bits, ".", kind, ".alpha")), kind == "scalar" ? 0.03 : 0.1, 0));
    }
  }
}

TEST(Calibrate, OneBitHasTheMeanOfWhatIsPositive) {
  Sequential model(torch::nn::Linear(torch::nn::LinearOptions(1, 1).bias(false)), StaircaseReLU(1));
  {
    const torch::NoGradGuard no_grad;
    model->parameters()[0].fill_(1);
  }
  calibrate(model,
            std::vector<Tensor>{at::tensor({-5.0f, 1.0f}).view({2, 1}), at::tensor({3.0f}).view({1, 1})});
  EXPECT_NEAR(model->parameters()[1].item<double>(), 2, 0.01);
}

// A module of a program: draws random numbers, and calls what it has as it is told.
struct ModelImpl : torch::nn::Module {
  explicit ModelImpl(int calls = 1) : calls(calls) {
    register_module("act", act);
    register_module("norm", norm);
  }
  Tensor forward(const Tensor& x) {
    EXPECT_FALSE(is_training() || act->is_training() || norm->is_training());
    EXPECT_FALSE(at::GradMode::is_enabled());
    auto y = norm(x) + 0 * at::rand(x.sizes());
    for (int i = 0; i < calls; ++i) y = act(y);
    return y;
  }
  int calls;
  StaircaseReLU act{2};
  torch::nn::BatchNorm1d norm{2};
};
TORCH_MODULE(Model);

TEST(Calibrate, LeavesModesStatisticsAndRandomNumbers) {
  Model model;
  model->norm->eval();  // while the rest trains
  const auto random = at::detail::getDefaultCPUGenerator().get_state();
  calibrate(model, std::vector<Tensor>{at::ones({4, 2}), at::full({4, 2}, 2.0)});
  EXPECT_TRUE(same(at::detail::getDefaultCPUGenerator().get_state(), random));
  EXPECT_TRUE(model->is_training() && model->act->is_training());
  EXPECT_FALSE(model->norm->is_training());
  EXPECT_EQ(model->norm->num_batches_tracked.item<int64_t>(), 0);
  EXPECT_FALSE(model->act->observer);
  EXPECT_TRUE(model->act->alpha.requires_grad());
  EXPECT_FALSE(near(model->act->alpha, at::scalar_tensor(0.48657), 1e-2, 0));
}

TEST(Calibrate, TakesHoldersPointersAndDataLoaders) {
  const auto x = at::arange(24, at::kFloat).view({12, 2}) / 24;
  Model holder;
  calibrate(holder, x.split(4));
  const auto expected = holder->act->alpha.detach().clone();
  const auto pointer = std::make_shared<ModelImpl>();
  calibrate(pointer, x.split(5));
  EXPECT_TRUE(same(pointer->act->alpha.detach(), expected));

  auto dataset = torch::data::datasets::TensorDataset(x.unbind())
                     .map(torch::data::transforms::Lambda<torch::data::TensorExample, torch::data::Example<>>(
                         [](torch::data::TensorExample example) {
                           return torch::data::Example<>(example.data, at::ones({}));
                         }));
  auto loader = torch::data::make_data_loader<torch::data::samplers::SequentialSampler>(
      std::move(dataset).map(torch::data::transforms::Stack<>()), 5);
  Model with_loader;
  calibrate(with_loader, *loader);
  EXPECT_TRUE(same(with_loader->act->alpha.detach(), expected));
}

TEST(Calibrate, TakesWhatIsConstOrHasNoName) {
  const auto x = at::arange(24, at::kFloat).view({12, 2}) / 24;
  const auto alpha = [](const Model& model) { return model->act->alpha.detach().clone(); };
  const auto start = alpha(Model());
  Model model;
  const auto again = [&] {
    const torch::NoGradGuard no_grad;
    const auto found = alpha(model);
    model->act->alpha.copy_(start);
    return found;
  };
  calibrate(model, x.split(4));
  const auto expected = again();
  EXPECT_FALSE(at::equal(expected, start));
  calibrate(&model, x.split(4));
  EXPECT_TRUE(same(again(), expected));
  calibrate(&*model, x.split(4));
  EXPECT_TRUE(same(again(), expected));
  calibrate(*model, x.split(4));
  EXPECT_TRUE(same(again(), expected));
  calibrate(model.ptr(), x.split(4));
  EXPECT_TRUE(same(again(), expected));
  const Model holder = model;
  calibrate(holder, x.split(4));
  EXPECT_TRUE(same(again(), expected));
  const std::shared_ptr<ModelImpl> pointer = model.ptr();
  calibrate(pointer, x.split(4));
  EXPECT_TRUE(same(again(), expected));
  calibrate(std::make_shared<ModelImpl>(), x.split(4));
}

TEST(Calibrate, RefusesWhatTheStaircaseWouldAndChangesNothing) {
  StaircaseReLU channels(StaircaseReLUOptions(2).channels(3));
  const auto refused = [](auto& module, const Tensor& x) {
    const auto before = module->alpha.detach().clone();
    const auto error = error_of<c10::Error>([&] { calibrate(module, std::vector<Tensor>{x}); });
    EXPECT_TRUE(same(module->alpha.detach(), before));
    EXPECT_EQ(error, error_of<c10::Error>([&] { module(x); }));
    return error;
  };
  EXPECT_EQ(refused(channels, at::ones({3})),
            "staircase_relu: channel_dim must be in -1..0 for x of shape [3], got 1");
  EXPECT_EQ(refused(channels, at::ones({})),
            "staircase_relu: channel_dim must be in -0..-1 for x of shape [], got 1");
  EXPECT_EQ(
      refused(channels, at::ones({2, 4})),
      "staircase_relu: alpha must have one element, or one for each of the 4 channels of dimension 1 of "
      "x, got shape [3]");
  StaircaseReLU alone(2);
  EXPECT_EQ(refused(alone, at::ones({3}, at::kLong)),
            "staircase_relu: x must be float64, float32, bfloat16 or float16, got Long");
}

TEST(Calibrate, IsNotBelowTheLeastStepSize) {
  StaircaseReLU module(StaircaseReLUOptions(2).alpha_min(0.5));
  calibrate(module, std::vector<Tensor>{at::full({4}, 0.01)});
  EXPECT_TRUE(same(module->alpha.detach(), at::scalar_tensor(0.5)));
}

TEST(Calibrate, RefusesNaNAndChangesNothing) {
  for (const double bad : {std::nan(""), std::numeric_limits<double>::infinity()}) {
    Sequential model(StaircaseReLU(2), torch::nn::Linear(3, 3), StaircaseReLU(4));
    const auto random = at::detail::getDefaultCPUGenerator().get_state();
    EXPECT_EQ(error_of([&] {
                calibrate(model, std::vector<Tensor>{at::ones({2, 3}), at::full({2, 3}, bad)});
              }),
              "calibrate: the input of '0' has NaN or infinity in it");
    EXPECT_FLOAT_EQ(model->parameters()[0].item<float>(), 0.48657f);
    EXPECT_FLOAT_EQ(model->parameters()[3].item<float>(), 0.166641f);
    EXPECT_TRUE(model->is_training());
    EXPECT_TRUE(same(at::detail::getDefaultCPUGenerator().get_state(), random));
    // It acts as a staircase again.
    EXPECT_FLOAT_EQ(
        StaircaseReLU(model->ptr<torchqat::nn::StaircaseReLUImpl>(0))(at::full({1}, 9.0f)).item<float>(),
        3 * 0.48657f);
  }
}

TEST(Calibrate, NamesWhatIsMissing) {
  StaircaseReLU module(2);
  EXPECT_EQ(error_of([&] { calibrate(module, std::vector<Tensor>{}); }), "calibrate: batches is empty");
  EXPECT_FLOAT_EQ(module->alpha.item<float>(), 0.48657f);
  torch::nn::Linear none(2, 2);
  EXPECT_EQ(error_of([&] {
              calibrate(none, std::vector<Tensor>{at::ones({1, 2})});
            }),
            "calibrate: the model has no StaircaseReLU");
}

TEST(Calibrate, WarnsOfStepSizesThatStayOrServeSeveralCalls) {
  const auto warning = [](auto&& model, const Tensor& x) {
    Warnings warnings;
    calibrate(model, std::vector<Tensor>{x});
    return warnings.messages;
  };
  using Messages = std::vector<std::string>;
  const std::string keep = "calibrate: these StaircaseReLUs keep their step size:\n  ";
  StaircaseReLU alone(2);
  EXPECT_EQ(warning(alone, -at::ones({2})), Messages{keep + "StaircaseReLU: no positive input"});
  EXPECT_FLOAT_EQ(alone->alpha.item<float>(), 0.48657f);
  StaircaseReLU channels(StaircaseReLUOptions(2).channels(3));
  EXPECT_EQ(warning(channels, at::tensor({1.0f, -1.0f, 0.0f}).view({1, 3})),
            Messages{keep + "StaircaseReLU: no positive input in 2 of 3 channels"});
  EXPECT_FLOAT_EQ(channels->alpha[1].item<float>(), 0.48657f);
  EXPECT_FALSE(near(channels->alpha[0], at::scalar_tensor(0.48657), 1e-2, 0));
  Model never(0);
  EXPECT_EQ(warning(never, at::ones({4, 2})), Messages{keep + "act: never called"});
  Model twice(2);
  EXPECT_EQ(
      warning(twice, at::ones({4, 2})),
      Messages{
          "calibrate: these StaircaseReLUs have one step size for several calls:\n  act: 2 calls a batch"});
  Model once;
  EXPECT_EQ(warning(once, at::ones({4, 2})), Messages{});
}

TEST(Calibration, IsOneAtATime) {
  Sequential model(torch::nn::Linear(2, 2), StaircaseReLU(1));
  {
    torchqat::Calibration first(*model);
    EXPECT_EQ(error_of<c10::Error>([&] { torchqat::Calibration second(*model); }),
              "calibrate: '1' is being calibrated already: one Calibration of a model at a time");
    first.run([&] { model->ptr<torchqat::nn::StaircaseReLUImpl>(1)->forward(at::full({2}, 3.0f)); });
    first.set_alphas();
    EXPECT_FALSE(model->is_training());
  }
  EXPECT_NEAR(model->ptr<torchqat::nn::StaircaseReLUImpl>(1)->alpha.item<double>(), 3, 0.01);
  EXPECT_TRUE(model->is_training());
  torchqat::Calibration another(*model);
}

TEST(Calibration, RunsModelsThatAreCalledInOtherWays) {
  Sequential model(StaircaseReLU(1));
  {
    torchqat::Calibration calibration(*model);
    EXPECT_TRUE(calibration.device().is_cpu());
    calibration.run([&] { model->forward(at::full({2}, 3.0f)); });
    calibration.set_alphas();
  }
  EXPECT_NEAR(model->parameters()[0].item<double>(), 3, 0.01);
  {
    torchqat::Calibration dropped(*model);
    dropped.run([&] { model->forward(at::full({2}, 8.0f)); });
  }
  EXPECT_NEAR(model->parameters()[0].item<double>(), 3, 0.01);
  EXPECT_TRUE(model->is_training());
}

}  // namespace
