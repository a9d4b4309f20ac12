// The modules of torchqat::nn as modules: options, text, clones, dtypes, saved files.
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/serialize.h>
#include <torchqat/torchqat.h>

#include <sstream>

#include "torch_checks.h"

namespace {

using at::Tensor;
using torch::nn::BatchNormOptions;
using torch::nn::Conv2dOptions;
using torch::nn::Sequential;
using namespace torchqat::nn;

std::string text_of(const auto& module) {
  std::stringstream text;
  text << module;
  return text.str();
}

TEST(StaircaseReLUModule, HasPythonsDefaults) {
  const StaircaseReLUOptions options;
  EXPECT_EQ(options.bits(), 4);
  EXPECT_EQ(options.ste(), "clipped_relu");
  EXPECT_EQ(options.alpha_grad(), "three_valued");
  EXPECT_FALSE(options.channels());
  EXPECT_EQ(std::get<std::string>(options.alpha_init()), "optimal");
  EXPECT_EQ(options.alpha_grad_scale(), 0.01);
  EXPECT_EQ(options.alpha_grad_clip(), 1);
  EXPECT_EQ(options.alpha_min(), 1e-3);
  EXPECT_TRUE(options.save_codes());
  StaircaseReLU module;
  EXPECT_TRUE(same(module->alpha.detach(), at::scalar_tensor(0.166641)));
  EXPECT_TRUE(module->alpha.requires_grad());
  EXPECT_EQ(module->named_parameters().keys(), std::vector<std::string>{"alpha"});
}

TEST(StaircaseReLUModule, StartsFromATableOrANumber) {
  EXPECT_FLOAT_EQ(StaircaseReLU(2)->alpha.item<float>(), 0.48657f);
  EXPECT_FLOAT_EQ(StaircaseReLU(StaircaseReLUOptions(2).alpha_init("papers"))->alpha.item<float>(), 0.6511f);
  EXPECT_FLOAT_EQ(StaircaseReLU(StaircaseReLUOptions(2).alpha_init(0.7))->alpha.item<float>(), 0.7f);
  EXPECT_FLOAT_EQ(StaircaseReLU(StaircaseReLUOptions(2).alpha_init(0.1).alpha_min(0.2))->alpha.item<float>(),
                  0.2f);
  EXPECT_TRUE(same(StaircaseReLU(StaircaseReLUOptions(2).channels(3).alpha_init(0.5))->alpha.detach(),
                   at::full({3}, 0.5)));
}

TEST(StaircaseReLUModule, NamesWrongOptions) {
  const auto refused = [](const StaircaseReLUOptions& options) {
    return error_of([&] { StaircaseReLU module(options); });
  };
  const StaircaseReLUOptions two(2);
  const double nan = std::nan("");
  EXPECT_EQ(refused(9), "StaircaseReLU: bits must be in 1..8, got 9");
  EXPECT_EQ(refused(0), "StaircaseReLU: bits must be in 1..8, got 0");
  EXPECT_EQ(refused(StaircaseReLUOptions(2).channels(0)),
            "StaircaseReLU: channels must be none or at least 1, got 0");
  EXPECT_EQ(refused(StaircaseReLUOptions(2).alpha_grad_clip(0)),
            "StaircaseReLU: alpha_grad_clip must be > 0, got 0");
  EXPECT_EQ(refused(StaircaseReLUOptions(2).alpha_min(nan)),
            "StaircaseReLU: alpha_min must be a finite number > 0, got nan");
  EXPECT_EQ(refused(StaircaseReLUOptions(2).alpha_grad_scale(nan)),
            "StaircaseReLU: alpha_grad_scale must be finite, got nan");
  EXPECT_EQ(refused(StaircaseReLUOptions(2).alpha_init(-1.0)),
            "StaircaseReLU: alpha_init must be a finite number > 0, got -1");
  EXPECT_EQ(refused(StaircaseReLUOptions(2).alpha_init("best")),
            "StaircaseReLU: alpha_init must be 'optimal', 'papers' or a number, got 'best'");
  EXPECT_EQ(refused(StaircaseReLUOptions(3).alpha_init("papers")),
            "StaircaseReLU: the papers give no alpha_init for 3 bits, only for 1, 2, 4");
  EXPECT_EQ(
      refused(StaircaseReLUOptions(2).ste("soft")),
      "staircase_relu: unknown ste 'soft'; choose one of identity, relu, clipped_relu, log_tailed_relu, "
      "reverse_exponential");
  EXPECT_EQ(refused(StaircaseReLUOptions(2).alpha_grad("none")),
            "staircase_relu: unknown alpha_grad 'none'; choose one of exact, three_valued, min, pact");
}

TEST(Modules, ArePrinted) {
  EXPECT_EQ(text_of(StaircaseReLU(2)),
            "torchqat::nn::StaircaseReLU(bits=2, ste=clipped_relu, alpha_grad=three_valued)");
  EXPECT_EQ(text_of(StaircaseReLU(StaircaseReLUOptions(1).ste("identity").alpha_grad("pact").channels(3))),
            "torchqat::nn::StaircaseReLU(bits=1, ste=identity, alpha_grad=pact, channels=3)");
  EXPECT_EQ(text_of(QuantConv2d(Conv2dOptions(1, 2, 3).bias(false))),
            "torchqat::nn::QuantConv2d(1, 2, kernel_size=[3, 3], stride=[1, 1], bias=false)");
  EXPECT_EQ(text_of(QuantConv1d(1, 2, 3)), "torchqat::nn::QuantConv1d(1, 2, kernel_size=3, stride=1)");
  EXPECT_EQ(text_of(QuantLinear(2, 3)),
            "torchqat::nn::QuantLinear(in_features=2, out_features=3, bias=true)");
  EXPECT_EQ(
      text_of(QuantMaxPool2d(2)),
      "torchqat::nn::QuantMaxPool2d(kernel_size=[2, 2], stride=[2, 2], padding=[0, 0], dilation=[1, 1], "
      "ceil_mode=false)");
  EXPECT_EQ(text_of(QuantBatchNorm1d(4)),
            "torchqat::nn::QuantBatchNorm1d(4, eps=1e-05, momentum=0.1, "
            "affine=true, track_running_stats=true)");
  EXPECT_EQ(text_of(QuantBatchNorm2d(4)),
            "torchqat::nn::QuantBatchNorm2d(4, eps=1e-05, momentum=0.1, "
            "affine=true, track_running_stats=true)");
}

// ---- clones ----

Sequential network() {
  at::manual_seed(0);
  QuantConv2d conv(Conv2dOptions(3, 4, 3).padding(1));
  conv->recompute = true;
  Sequential net(StaircaseReLU(StaircaseReLUOptions(2).channels(3)), conv, QuantBatchNorm2d(4),
                 StaircaseReLU(1), QuantMaxPool2d(2),
                 torch::nn::Flatten(torch::nn::FlattenOptions().start_dim(1).end_dim(2)),
                 QuantConv1d(8, 5, 2), QuantBatchNorm1d(5), torch::nn::Flatten(), QuantLinear(5, 2));
  net->forward(at::randn({6, 3, 4, 4}));  // running statistics
  return net;
}

std::vector<std::pair<std::string, Tensor>> tensors_of(const torch::nn::Module& module) {
  std::vector<std::pair<std::string, Tensor>> tensors;
  for (const auto& named : {module.named_parameters(), module.named_buffers()}) {
    for (const auto& item : named) tensors.emplace_back(item.key(), item.value());
  }
  return tensors;
}

// The same values in tensors of its own.
void expect_independent(const torch::nn::Module& model, const torch::nn::Module& copy) {
  const auto ours = tensors_of(model);
  const auto theirs = tensors_of(copy);
  ASSERT_EQ(ours.size(), theirs.size());
  for (size_t i = 0; i < ours.size(); ++i) {
    EXPECT_EQ(ours[i].first, theirs[i].first);
    EXPECT_TRUE(same(ours[i].second, theirs[i].second)) << ours[i].first;
    EXPECT_FALSE(ours[i].second.is_alias_of(theirs[i].second)) << ours[i].first;
    EXPECT_EQ(ours[i].second.requires_grad(), theirs[i].second.requires_grad()) << ours[i].first;
  }
}

TEST(Modules, AreClonedInASequential) {
  auto net = network();
  net->eval();
  const auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(net->clone());
  expect_independent(*net, *copy);
  EXPECT_FALSE(copy->ptr(2)->is_training());
  EXPECT_TRUE(copy->ptr<QuantConv2dImpl>(1)->recompute);
  EXPECT_EQ(text_of(*net), text_of(*copy));
  const auto x = at::randn({2, 3, 4, 4});
  EXPECT_TRUE(same(net->forward(x), copy->forward(x)));
  {
    const torch::NoGradGuard no_grad;
    for (auto& p : net->parameters()) p.add_(1);
  }
  EXPECT_FALSE(at::equal(net->forward(x), copy->forward(x)));
  // What the clone's layers compute with are the parameters that it lists.
  const auto before = copy->forward(x);
  {
    const torch::NoGradGuard no_grad;
    for (auto& p : copy->parameters()) p.mul_(1.5);
  }
  EXPECT_FALSE(at::equal(copy->forward(x), before));
}

TEST(Modules, AreClonedAlone) {
  const auto net = network();
  for (size_t i = 0; i < net->size(); ++i) {
    const auto layer = net->ptr(i);
    const auto copy = layer->clone(torch::Device(at::kCPU));
    EXPECT_EQ(typeid(*layer), typeid(*copy)) << i;
    expect_independent(*layer, *copy);
  }
}

struct ParentImpl : torch::nn::Cloneable<ParentImpl> {
  ParentImpl() { reset(); }
  void reset() override {
    act = register_module("act", StaircaseReLU(2));
    linear = register_module("linear", QuantLinear(3, 2));
    conv = register_module("conv", QuantConv1d(1, 2, 2));
  }
  Tensor forward(const Tensor& x) { return conv(linear(act(x)).unsqueeze(1)); }
  StaircaseReLU act{nullptr};
  QuantLinear linear{nullptr};
  QuantConv1d conv{nullptr};
};
TORCH_MODULE(Parent);

TEST(Modules, AreClonedInAModuleOfTheProgram) {
  Parent parent;
  {
    const torch::NoGradGuard no_grad;
    parent->act->alpha.fill_(0.9);
  }
  const auto copy = std::dynamic_pointer_cast<ParentImpl>(parent->clone());
  expect_independent(*parent, *copy);
  EXPECT_TRUE(copy->linear->weight.is_same(copy->named_parameters()["linear.weight"]));
  EXPECT_TRUE(copy->act->alpha.is_same(copy->named_parameters()["act.alpha"]));
  const auto x = at::randn({4, 3});
  EXPECT_TRUE(same(parent(x), copy->forward(x)));
}

TEST(StaircaseReLUModule, ACloneObservesNothing) {
  StaircaseReLU module(2);
  module->observer = [](const Tensor&) {};
  const auto copy = std::dynamic_pointer_cast<StaircaseReLUImpl>(module->clone());
  EXPECT_FALSE(copy->observer);
  EXPECT_TRUE(same(module(at::full({1}, 9.0)), at::full({1}, 9.0)));  // a plain ReLU
  EXPECT_FALSE(at::equal(copy->forward(at::full({1}, 9.0)), at::full({1}, 9.0)));
}

// ---- dtypes, files ----

TEST(Modules, RunInOtherDtypes) {
  for (const auto dtype : {at::kDouble, at::kBFloat16}) {
    auto net = network();
    net->to(dtype);
    const auto x = at::randn({2, 3, 4, 4}).to(dtype).requires_grad_();
    const auto out = net->forward(x);
    EXPECT_EQ(out.scalar_type(), dtype);
    out.sum().backward();
    EXPECT_EQ(x.grad().scalar_type(), dtype);
    for (const auto& p : net->named_parameters()) {
      EXPECT_EQ(p.value().scalar_type(), dtype) << p.key();
      EXPECT_EQ(p.value().grad().scalar_type(), dtype) << p.key();
    }
    EXPECT_EQ(net->ptr<QuantBatchNorm2dImpl>(2)->num_batches_tracked.item<int64_t>(), 2);
  }
}

template <typename Module>
std::stringstream saved(const Module& module) {
  std::stringstream file;
  torch::save(module, file);
  return file;
}

TEST(Modules, AreSavedAndLoadedBitForBit) {
  const auto net = network();
  auto file = saved(net);
  auto other = network();
  {
    const torch::NoGradGuard no_grad;
    for (auto& [name, value] : tensors_of(*other)) value.fill_(3);
  }
  torch::load(other, file);
  expect_independent(*net, *other);
}

TEST(StaircaseReLUModule, IsNotLoadedIntoOneOfOtherSettings) {
  auto file = saved(Sequential(torch::nn::ReLU(), StaircaseReLU(2)));
  const auto refused = [&](const StaircaseReLUOptions& options) {
    file.clear();
    file.seekg(0);
    Sequential other(torch::nn::ReLU(), StaircaseReLU(StaircaseReLUOptions(options).alpha_init(0.9)));
    const auto error = error_of([&] { torch::load(other, file); });
    EXPECT_FLOAT_EQ(other->parameters()[0].item<float>(), error == "no error" ? 0.48657f : 0.9f);
    return error;
  };
  EXPECT_EQ(refused(StaircaseReLUOptions(2).alpha_grad_scale(1)), "no error");
  EXPECT_EQ(refused(3),
            "StaircaseReLU: the state must be of bits=3, ste=clipped_relu, alpha_grad=three_valued, got "
            "bits=2, ste=clipped_relu, alpha_grad=three_valued");
  EXPECT_EQ(refused(StaircaseReLUOptions(2).ste("relu")),
            "StaircaseReLU: the state must be of bits=2, ste=relu, alpha_grad=three_valued, got "
            "bits=2, ste=clipped_relu, alpha_grad=three_valued");
}

TEST(StaircaseReLUModule, IsNotLoadedIntoOneOfOtherChannels) {
  auto file = saved(StaircaseReLU(StaircaseReLUOptions(2).channels(3)));
  StaircaseReLU other(2);
  EXPECT_EQ(error_of([&] { torch::load(other, file); }),
            "StaircaseReLU: alpha of the state must have shape [], got [3]");
  EXPECT_EQ(other->alpha.dim(), 0);
}

TEST(BuildInfo, SaysWhatTheLibraryIs) {
  const auto info = torchqat::build_info();
  EXPECT_EQ(info.torchqat, "0.1.0");
  EXPECT_EQ(info.torch.rfind("2.", 0), 0u) << info.torch;
  EXPECT_FALSE(info.compiler.empty());
  EXPECT_FALSE(info.cpu_capability.empty());
}

}  // namespace
