// StaircaseReLU, and each layer behind one, against what the oracles computed (tests/write_oracle_values.py),
// and against torch's layers, which keep their input whole.
#include <torch/nn/modules/container/sequential.h>
#include <torchqat/torchqat.h>

#include <cmath>
#include <limits>

#include "torch_checks.h"

namespace {

using at::Tensor;
using torch::nn::Conv1dOptions;
using torch::nn::Conv2dOptions;
using torch::nn::MaxPool2dOptions;
using torch::nn::Sequential;
using torchqat::nn::QuantBatchNorm1d;
using torchqat::nn::QuantBatchNorm2d;
using torchqat::nn::QuantConv1d;
using torchqat::nn::QuantConv2d;
using torchqat::nn::QuantLinear;
using torchqat::nn::QuantMaxPool2d;
using torchqat::nn::StaircaseReLU;
using torchqat::nn::StaircaseReLUOptions;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

TEST(Oracles, StaircaseReLUBoundsItsStepSizeAndTheGradientOfIt) {
  OracleValues values("staircase_module");
  const std::map<std::string, StaircaseReLUOptions> modules{
      {"defaults", StaircaseReLUOptions(2).alpha_init(0.3)},
      {"scaled", StaircaseReLUOptions(2).alpha_init(0.3).alpha_grad_scale(0.5).alpha_grad_clip(kInfinity)},
      {"clipped", StaircaseReLUOptions(2).alpha_init(0.3).alpha_grad_scale(-2).alpha_grad_clip(0.25)},
      {"least", StaircaseReLUOptions(2).alpha_grad_scale(0.5).alpha_grad_clip(kInfinity).alpha_min(0.3)},
  };
  for (const auto& [name, options] : modules) {
    for (const std::string kind : {"scalar", "channels"}) {
      SCOPED_TRACE(name + "." + kind);
      StaircaseReLU module(kind == "scalar" ? options : StaircaseReLUOptions(options).channels(3));
      const torch::AutoGradMode grads(true);
      if (name == "least") {
        const torch::NoGradGuard no_grad;
        module->alpha.fill_(0.1);  // forward takes alpha_min all the same, and lets alpha be
      }
      const auto x = values("x").clone().requires_grad_();
      const auto y = module(x);
      EXPECT_TRUE(same(y, values(name + "." + kind + ".y")));
      y.backward(values("grad"));
      EXPECT_TRUE(same(x.grad(), values(name + "." + kind + ".grad_x")));
      EXPECT_TRUE(near(module->alpha.grad(), values(name + "." + kind + ".grad_alpha")));
      EXPECT_NEAR(module->alpha.mean().item<double>(), name == "least" ? 0.1 : 0.3, 1e-7);
    }
  }
}

// A staircase as the oracle has it before each layer.
StaircaseReLU staircase() {
  return StaircaseReLU(
      StaircaseReLUOptions(2).alpha_init(0.3).alpha_grad_scale(0.5).alpha_grad_clip(kInfinity));
}

void set(torch::nn::Module& module, const std::string& name, const Tensor& value) {
  const torch::NoGradGuard no_grad;
  module.named_parameters()[name].copy_(value);
}

// A model that begins with a staircase, on the values of a case; `layer` has the parameters.
void check(OracleValues& values, const std::string& name, Sequential model, torch::nn::Module& layer) {
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    SCOPED_TRACE(name + "." + c10::toString(dtype));
    model->to(dtype);
    // The oracle's step size is the float32 number.
    if (dtype == at::kDouble) set(*model, "0.alpha", at::scalar_tensor(0.3, at::kFloat));
    model->zero_grad();
    for (const std::string key : {"weight", "bias"}) {
      if (values.has(name + "." + key)) set(layer, key, values(name + "." + key));
    }
    const auto x = values(name + ".x").to(dtype).clone().requires_grad_();
    const auto out = model->forward(x);
    EXPECT_TRUE(near(out, values(name + ".out")));
    out.backward(values(name + ".grad").to(dtype));
    EXPECT_TRUE(near(x.grad(), values(name + ".grad_x")));
    EXPECT_TRUE(near(model->named_parameters()["0.alpha"].grad(), values(name + ".grad_alpha")));
    for (const std::string key : {"weight", "bias"}) {
      if (values.has(name + "." + key)) {
        EXPECT_TRUE(near(layer.named_parameters()[key].grad(), values(name + ".grad_" + key)));
      }
    }
  }
}

template <typename Layer>
void check(OracleValues& values, const std::string& name, Layer layer) {
  check(values, name, Sequential(staircase(), layer), *layer);
}

TEST(Oracles, QuantConv2d) {
  OracleValues values("layers", "conv2d.");
  check(values, "plain", QuantConv2d(4, 3, 3));
  check(values, "no_bias", QuantConv2d(Conv2dOptions(4, 3, 3).stride({2, 1}).padding({1, 2}).bias(false)));
  check(values, "groups", QuantConv2d(Conv2dOptions(4, 4, 2).groups(2).dilation({1, 2})));
  check(values, "same", QuantConv2d(Conv2dOptions(4, 2, 3).padding(torch::kSame)));
  check(values, "same_even", QuantConv2d(Conv2dOptions(4, 2, 2).padding(torch::kSame)));
  const auto padded = Conv2dOptions(4, 2, 3).padding({1, 2});
  check(values, "reflect", QuantConv2d(Conv2dOptions(padded).padding_mode(torch::kReflect)));
  check(values, "replicate", QuantConv2d(Conv2dOptions(padded).padding_mode(torch::kReplicate)));
  check(values, "circular", QuantConv2d(Conv2dOptions(padded).padding_mode(torch::kCircular)));
}

TEST(Oracles, QuantConv1d) {
  OracleValues values("layers", "conv1d.");
  check(values, "plain", QuantConv1d(Conv1dOptions(4, 3, 3).stride(2).padding(1)));
  check(values, "groups", QuantConv1d(Conv1dOptions(4, 4, 3).groups(4).dilation(2).bias(false)));
  check(values, "same", QuantConv1d(Conv1dOptions(4, 2, 3).padding(torch::kSame)));
  check(values, "same_even", QuantConv1d(Conv1dOptions(4, 2, 2).padding(torch::kSame)));
  check(values, "circular", QuantConv1d(Conv1dOptions(4, 2, 3).padding(1).padding_mode(torch::kCircular)));
}

TEST(Oracles, QuantLinear) {
  OracleValues values("layers", "linear.");
  check(values, "plain", QuantLinear(6, 4));
  check(values, "no_bias", QuantLinear(torch::nn::LinearOptions(6, 4).bias(false)));
}

TEST(Oracles, QuantMaxPool2d) {
  OracleValues values("layers", "max_pool2d.");
  check(values, "plain", QuantMaxPool2d(2));
  check(values, "padded", QuantMaxPool2d(MaxPool2dOptions(3).stride(2).padding(1)));
  check(values, "ceil", QuantMaxPool2d(MaxPool2dOptions({2, 1}).stride({3, 2}).ceil_mode(true)));
  check(values, "dilated", QuantMaxPool2d(MaxPool2dOptions(2).stride(1).dilation({2, 1})));
}

// Two batches in training, then one that is evaluated.
template <typename Norm>
void check_norm(const std::string& dims) {
  OracleValues values("batch_norm", dims + ".");
  for (const std::string name : {"plain", "mean", "not_affine"}) {
    torch::nn::BatchNormOptions options(3);
    if (name == "mean") options.momentum(std::nullopt);
    if (name == "not_affine") options.momentum(0.4).affine(false);
    for (const auto dtype : {at::kFloat, at::kDouble}) {
      SCOPED_TRACE(name + "." + c10::toString(dtype));
      Norm norm(options);
      Sequential model(staircase(), norm);
      model->to(dtype);
      set(*model, "0.alpha", at::scalar_tensor(0.3, at::kFloat));
      for (const std::string number : {".1", ".2", ".3"}) {
        model->train(number != ".3");
        model->zero_grad();
        const auto at = [&](const char* key) { return values(name + number + "." + key); };
        if (name != "not_affine") {
          set(*norm, "weight", at("weight"));
          set(*norm, "bias", at("bias"));
        }
        const auto x = at("x").to(dtype).clone().requires_grad_();
        const auto out = model->forward(x);
        EXPECT_TRUE(near(out, at("out")));
        out.backward(at("grad").to(dtype));
        EXPECT_TRUE(near(x.grad(), at("grad_x")));
        EXPECT_TRUE(near(model->named_parameters()["0.alpha"].grad(), at("grad_alpha")));
        if (name != "not_affine") {
          EXPECT_TRUE(near(norm->weight.grad(), at("grad_weight")));
          EXPECT_TRUE(near(norm->bias.grad(), at("grad_bias")));
        }
      }
      EXPECT_TRUE(near(norm->running_mean, values(name + ".running_mean")));
      EXPECT_TRUE(near(norm->running_var, values(name + ".running_var")));
      EXPECT_EQ(norm->num_batches_tracked.template item<int64_t>(), 2);
    }
  }
}

TEST(Oracles, QuantBatchNorm) {
  check_norm<QuantBatchNorm1d>("1d");
  check_norm<QuantBatchNorm1d>("1d_long");
  check_norm<QuantBatchNorm2d>("2d");
}

TEST(Oracles, QuantBatchNormHasItsConvolutionComputedAgain) {
  OracleValues values("batch_norm", "conv.");
  for (const bool recompute : {false, true}) {
    QuantConv2d conv(Conv2dOptions(4, 3, 2).bias(false));
    conv->recompute = recompute;
    QuantBatchNorm2d norm(3);
    Sequential model(staircase(), conv, norm);
    set(*conv, "weight", values("weight"));
    set(*norm, "bias", values("bias"));
    const auto x = values("x").clone().requires_grad_();
    const auto out = model->forward(x);
    EXPECT_TRUE(near(out, values("out")));
    out.backward(values("grad"));
    EXPECT_TRUE(near(x.grad(), values("grad_x")));
    EXPECT_TRUE(near(conv->weight.grad(), values("grad_weight")));
    EXPECT_TRUE(near(norm->bias.grad(), values("grad_bias")));
    EXPECT_TRUE(near(model->named_parameters()["0.alpha"].grad(), values("grad_alpha")));
  }
}

// ---- torch's layers ----

// Output, gradient of x and gradients of the parameters.
std::vector<Tensor> results(Sequential& model, const Tensor& x) {
  const auto input = x.detach().clone().requires_grad_();
  const auto out = model->forward(input);
  model->zero_grad();
  out.backward(at::ones_like(out).mul_(at::arange(out.numel()).view_as(out).remainder(7) - 3));
  std::vector<Tensor> all{out, input.grad()};
  for (const auto& p : model->parameters()) all.push_back(p.grad());
  return all;
}

// Bit by bit those of a staircase that keeps regions before torch's layers, with the same parameters.
void expect_same_gradients(Sequential ours, Sequential torchs, const Tensor& x) {
  const torch::NoGradGuard no_grad;
  const auto from = ours->parameters();
  const auto to = torchs->parameters();
  ASSERT_EQ(from.size(), to.size());
  for (size_t i = 0; i < from.size(); ++i) to[i].copy_(from[i]);
  const torch::AutoGradMode grads(true);
  const auto actual = results(ours, x);
  const auto expected = results(torchs, x);
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_TRUE(same(actual[i], expected[i])) << i;
}

TEST(CodeSaving, GivesTheGradientsOfTorchsLayersBitByBit) {
  at::manual_seed(0);
  const auto x = at::randn({2, 4, 6, 7});
  const auto whole = [] { return StaircaseReLU(StaircaseReLUOptions(2).save_codes(false)); };
  expect_same_gradients(Sequential(StaircaseReLU(2), QuantConv2d(4, 5, 3)),
                        Sequential(whole(), torch::nn::Conv2d(4, 5, 3)), x);
  expect_same_gradients(
      Sequential(StaircaseReLU(2), QuantMaxPool2d(2), QuantConv2d(4, 5, 3), QuantBatchNorm2d(5)),
      Sequential(whole(), torch::nn::MaxPool2d(2), torch::nn::Conv2d(4, 5, 3), torch::nn::BatchNorm2d(5)), x);
  expect_same_gradients(Sequential(StaircaseReLU(2), torch::nn::Flatten(), QuantLinear(168, 3)),
                        Sequential(whole(), torch::nn::Flatten(), torch::nn::Linear(168, 3)), x);
  expect_same_gradients(Sequential(StaircaseReLU(2), QuantConv1d(6, 5, 3)),
                        Sequential(whole(), torch::nn::Conv1d(6, 5, 3)), x[0]);
}

TEST(CodeSaving, DoesNotKeepTheActivation) {
  auto module = StaircaseReLU(2);
  auto conv = QuantConv2d(4, 5, 3);
  const auto x = at::randn({2, 4, 6, 7});
  c10::weak_intrusive_ptr<c10::TensorImpl> activation(module(x).getIntrusivePtr());
  Tensor out;
  {
    const auto y = module(x);
    activation = y.getIntrusivePtr();
    out = conv(y);
  }
  EXPECT_TRUE(activation.expired());
  out.sum().backward();
  EXPECT_TRUE(module->alpha.grad().defined());
}

TEST(Layers, RefuseInputsOfOtherDimensions) {
  EXPECT_EQ(error_of([] {
              QuantBatchNorm2d(3)->forward(at::ones({2, 3}));
            }),
            "QuantBatchNorm2d: input must have 4 dimensions, got 2");
  EXPECT_EQ(error_of([] {
              QuantBatchNorm1d(3)->forward(at::ones({2, 3, 4, 5}));
            }),
            "QuantBatchNorm1d: input must have 2 or 3 dimensions, got 4");
  EXPECT_EQ(
      error_of([] {
        QuantBatchNorm1d(3)->forward(at::ones({1, 3}));
      }),
      "QuantBatchNorm1d: in training there must be more than one value per channel, got an input of [1, 3]");
}

TEST(Layers, AreTakenOutOfASequentialByTheirClass) {
  namespace qnn = torchqat::nn;
  torch::nn::Sequential net(qnn::QuantConv1d(1, 1, 1), qnn::QuantConv2d(1, 1, 1), qnn::QuantLinear(1, 1),
                            qnn::QuantMaxPool2d(1), qnn::QuantBatchNorm1d(1), qnn::QuantBatchNorm2d(1),
                            qnn::StaircaseReLU(2));
  EXPECT_EQ(net->at<qnn::QuantConv1dImpl>(0).weight.dim(), 3);
  EXPECT_EQ(net->at<qnn::QuantConv2dImpl>(1).weight.dim(), 4);
  EXPECT_EQ(net->at<qnn::QuantLinearImpl>(2).weight.dim(), 2);
  EXPECT_FALSE(net->at<qnn::QuantMaxPool2dImpl>(3).options.ceil_mode());
  EXPECT_EQ(net->at<qnn::QuantBatchNorm1dImpl>(4).weight.dim(), 1);
  EXPECT_EQ(net->at<qnn::QuantBatchNorm2dImpl>(5).weight.dim(), 1);
  EXPECT_EQ(net->at<qnn::StaircaseReLUImpl>(6).options.bits(), 2);
}

// LibTorch's own numbers of padding "same" exchange the dimensions.
TEST(Layers, PadsByItsOptionsWhereTheKernelIsNotSquare) {
  const auto options = torch::nn::Conv2dOptions(1, 1, {3, 5}).padding(torch::kSame);
  torchqat::nn::QuantConv2d conv(options);
  const auto x = at::randn({1, 1, 7, 9});
  EXPECT_TRUE(same(conv(x), at::conv2d(x, conv->weight, conv->bias, {1, 1}, "same")));
  torchqat::nn::QuantConv2d even(torch::nn::Conv2dOptions(1, 1, {2, 5}).padding(torch::kSame));
  EXPECT_TRUE(same(even(x), at::conv2d(x, even->weight, even->bias, {1, 1}, "same")));
  torchqat::nn::QuantConv2d around(
      torch::nn::Conv2dOptions(1, 1, {3, 5}).padding(torch::kSame).padding_mode(torch::kReflect));
  EXPECT_TRUE(same(around(x), at::conv2d(at::pad(x, {2, 2, 1, 1}, "reflect"), around->weight, around->bias)));
  conv->options.padding(1);  // options can be changed, as those of torch's layers
  EXPECT_TRUE(same(conv(x), at::conv2d(x, conv->weight, conv->bias, {1, 1}, {1, 1})));
}

}  // namespace
