// torchqat::optim::param_groups: which parameters are quantized.
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/sequential.h>
#include <torchqat/torchqat.h>

#include "torch_checks.h"

namespace {

using torch::nn::Sequential;
using torchqat::nn::StaircaseReLU;
using torchqat::nn::StaircaseReLUOptions;
using torchqat::optim::param_groups;
using torchqat::optim::ParamGroup;
using torchqat::optim::ParamGroupsOptions;

// Group by group: its name, and all the names that the model has for its parameters, in order.
std::string shown(const torch::nn::Module& model, const std::vector<ParamGroup>& groups) {
  std::string text;
  for (const auto& group : groups) {
    text += (text.empty() ? "" : "; ") + group.name + ":";
    for (const auto& param : group.params) {
      for (const auto& item : model.named_parameters()) {
        if (item.value().is_same(param)) text += " " + item.key();
      }
    }
  }
  return text;
}

Sequential network() {
  using namespace torch::nn;
  return Sequential(torchqat::nn::QuantConv2d(1, 2, 3), BatchNorm2d(2), StaircaseReLU(2), Conv2d(2, 3, 3),
                    StaircaseReLU(StaircaseReLUOptions(2).alpha_min(0.25)), Linear(3, 4));
}

TEST(ParamGroups, SortTheParametersOfAModel) {
  const auto net = network();
  const auto groups = param_groups(*net, 2);
  EXPECT_EQ(shown(*net, groups),
            "quantized: 0.weight 3.weight 5.weight; alphas: 2.alpha; alphas: 4.alpha; "
            "float: 0.bias 1.weight 1.bias 3.bias 5.bias");
  EXPECT_EQ(groups[0].quant_bits, 2);
  EXPECT_EQ(groups[0].channel_dim, std::nullopt);
  EXPECT_EQ(groups[0].method, "exact");
  EXPECT_EQ(groups[0].min_value, std::nullopt);
  EXPECT_EQ(groups[1].min_value, 1e-3);
  EXPECT_EQ(groups[2].min_value, 0.25);
  EXPECT_EQ(groups[1].lr, std::nullopt);
  EXPECT_EQ(groups[3].quant_bits, std::nullopt);
}

TEST(ParamGroups, OptionsAreTakenOver) {
  const auto net = network();
  const auto groups = param_groups(
      *net, 4, ParamGroupsOptions().alpha_lr(0.5).alpha_weight_decay(0.25).channel_dim(0).method("lloyd"));
  EXPECT_EQ(groups[0].channel_dim, 0);
  EXPECT_EQ(groups[0].method, "lloyd");
  EXPECT_EQ(groups[0].lr, std::nullopt);
  EXPECT_EQ(groups[1].lr, 0.5);
  EXPECT_EQ(groups[1].weight_decay, 0.25);
  EXPECT_EQ(groups[3].lr, std::nullopt);
}

TEST(ParamGroups, FirstLastAndExcludedStayFloat) {
  const auto net = network();
  const auto quantized = [&](const ParamGroupsOptions& options) {
    const auto text = shown(*net, param_groups(*net, 1, options));
    return text.substr(0, text.find(';'));
  };
  EXPECT_EQ(quantized(ParamGroupsOptions().quantize_first(false)), "quantized: 3.weight 5.weight");
  EXPECT_EQ(quantized(ParamGroupsOptions().quantize_last(false)), "quantized: 0.weight 3.weight");
  EXPECT_EQ(quantized(ParamGroupsOptions().exclude({"3", "5"})), "quantized: 0.weight");
  torch::nn::Module parent;
  parent.register_module("0", network());
  parent.register_module("1", torch::nn::Linear(2, 2));
  EXPECT_EQ(
      shown(parent, param_groups(parent, 1, ParamGroupsOptions().exclude({"0"}))),
      "quantized: 1.weight; alphas: 0.2.alpha; alphas: 0.4.alpha; float: 0.0.weight 0.0.bias 0.1.weight "
      "0.1.bias 0.3.weight 0.3.bias 0.5.weight 0.5.bias 1.bias");
}

TEST(ParamGroups, TransposedConvolutionsHaveTheirOutputChannelsInDimensionOne) {
  using namespace torch::nn;
  Sequential net(Conv2d(1, 2, 3), ConvTranspose2d(2, 3, 3), ConvTranspose1d(2, 3, 3), Conv3d(1, 2, 3));
  const auto groups = param_groups(*net, 1, ParamGroupsOptions().channel_dim(0));
  EXPECT_EQ(shown(*net, groups),
            "quantized: 0.weight 3.weight; quantized: 1.weight 2.weight; float: 0.bias 1.bias 2.bias 3.bias");
  EXPECT_EQ(groups[0].channel_dim, 0);
  EXPECT_EQ(groups[1].channel_dim, 1);
  EXPECT_EQ(shown(*net, param_groups(*net, 1)),
            "quantized: 0.weight 1.weight 2.weight 3.weight; float: 0.bias 1.bias 2.bias 3.bias");
}

TEST(ParamGroups, ASharedWeightIsQuantizedWhereAllWouldHaveIt) {
  using namespace torch::nn;
  Linear first(2, 2), second(2, 2), third(2, 2);
  Sequential twice(first, StaircaseReLU(1), first, third);
  EXPECT_EQ(shown(*twice, param_groups(*twice, 1)),
            "quantized: 0.weight 2.weight 3.weight; alphas: 1.alpha; float: 0.bias 2.bias 3.bias");
  EXPECT_EQ(shown(*twice, param_groups(*twice, 1, ParamGroupsOptions().exclude({"2"}))),
            "quantized: 3.weight; alphas: 1.alpha; float: 0.weight 2.weight 0.bias 2.bias 3.bias");
  second->register_parameter("mixer", first->weight);  // which is no weight there
  Sequential mixed(first, second, third);
  EXPECT_EQ(shown(*mixed, param_groups(*mixed, 1)),
            "quantized: 1.weight 2.weight; float: 0.weight 1.mixer 0.bias 1.bias 2.bias");
}

TEST(ParamGroups, FrozenParametersAreInNone) {
  const auto net = network();
  net->named_parameters()["0.weight"].set_requires_grad(false);
  net->named_parameters()["2.alpha"].set_requires_grad(false);
  EXPECT_EQ(shown(*net, param_groups(*net, 1)),
            "quantized: 3.weight 5.weight; alphas: 4.alpha; float: 0.bias 1.weight 1.bias 3.bias 5.bias");
}

TEST(ParamGroups, WithoutBitsTheGroupsAreTheSameAndFloat) {
  const auto net = network();
  const auto groups = param_groups(*net, std::nullopt, ParamGroupsOptions().channel_dim(0));
  EXPECT_EQ(shown(*net, groups), shown(*net, param_groups(*net, 1)));
  for (const auto& group : groups) EXPECT_EQ(group.quant_bits, std::nullopt);
  Sequential nothing(torch::nn::BatchNorm1d(2));
  EXPECT_EQ(shown(*nothing, param_groups(*nothing, std::nullopt)), "float: 0.weight 0.bias");
}

TEST(ParamGroups, NameWhatIsWrong) {
  const auto net = network();
  EXPECT_EQ(error_of([&] { param_groups(*net, 9); }), "param_groups: weight_bits must be in 1..8, got 9");
  EXPECT_EQ(error_of([&] {
              param_groups(*net, 1, ParamGroupsOptions().exclude({"0", "nine"}));
            }),
            "param_groups: exclude names no module of the model: nine");
  Sequential nothing(torch::nn::BatchNorm1d(2));
  EXPECT_EQ(error_of([&] { param_groups(*nothing, 1); }),
            "param_groups: the model has no weight to quantize");
}

TEST(ParamGroups, MakeAnOptimizerThatQuantizesAtOnce) {
  const auto net = network();
  torchqat::optim::BCGD optimizer(param_groups(*net, 1), torchqat::optim::BCGDOptions(0.1));
  for (const auto* name : {"0.weight", "3.weight", "5.weight"}) {
    const auto w = net->named_parameters()[name].detach();
    EXPECT_TRUE(same(w.abs(), w.abs().flatten()[0].expand_as(w))) << name;
  }
  EXPECT_FALSE(same(net->named_parameters()["5.bias"].detach().abs().min(),
                    net->named_parameters()["5.bias"].detach().abs().max()));
}

}  // namespace
