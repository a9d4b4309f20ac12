// BCGD's steps and options: worked out by hand, and against torch::optim::SGD where nothing is quantized.
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/schedulers/step_lr.h>
#include <torch/optim/sgd.h>
#include <torchqat/torchqat.h>

#include <cmath>
#include <vector>

#include "torch_checks.h"

namespace {

using at::Tensor;
using torch::optim::OptimizerParamGroup;
using torchqat::optim::BCGD;
using torchqat::optim::BCGDOptions;
using torchqat::optim::BCGDParamState;
using torchqat::optim::ParamGroup;

Tensor parameter(const Tensor& values) { return values.clone().requires_grad_(); }

const BCGDParamState& state_of(const BCGD& optimizer, const Tensor& param) {
  return static_cast<const BCGDParamState&>(*optimizer.state().at(param.unsafeGetTensorImpl()));
}

const BCGDOptions& options_of(const BCGD& optimizer, size_t group) {
  return static_cast<const BCGDOptions&>(optimizer.param_groups().at(group).options());
}

// ---- by hand ----

// lr 1/2, blend 1/4. All numbers are exact in binary.
//   y                      = 1, -1/2, 2, -1/2                      scale = mean |y| = 1    w = 1, -1, 1, -1
//   3/4 y + 1/4 w          = 1, -0.625, 1.75, -0.625
//   - 1/2 (1, 1, 4, -2)    = 0.5, -1.125, -0.25, 0.375             scale = 2.25 / 4 = 0.5625
// With momentum 1/2 the buffer is the first gradient, and then 1/2 (1, 1, 4, -2) + 1 = 1.5, 1.5, 3, 0:
//   3/4 y + 1/4 w          = 0.515625, -0.984375, -0.328125, 0.421875
//   - 1/2 buffer           = -0.234375, -1.734375, -1.828125, 0.421875      scale = 4.21875 / 4 = 1.0546875
TEST(Bcgd, StepsOfOneBitWorkedOutByHand) {
  const auto p = parameter(at::tensor({1.0f, -0.5f, 2.0f, -0.5f}));
  BCGD optimizer({ParamGroup{.params = {p}, .quant_bits = 1}}, BCGDOptions(0.5).momentum(0.5).blend(0.25));
  EXPECT_TRUE(same(p.detach(), at::tensor({1.0f, -1.0f, 1.0f, -1.0f})));
  EXPECT_TRUE(same(optimizer.latent(p), at::tensor({1.0f, -0.5f, 2.0f, -0.5f})));
  p.mutable_grad() = at::tensor({1.0f, 1.0f, 4.0f, -2.0f});
  optimizer.step();
  EXPECT_TRUE(same(optimizer.latent(p), at::tensor({0.5f, -1.125f, -0.25f, 0.375f})));
  EXPECT_TRUE(same(state_of(optimizer, p).scale(), at::scalar_tensor(0.5625f)));
  EXPECT_TRUE(same(p.detach(), 0.5625f * at::tensor({1.0f, -1.0f, -1.0f, 1.0f})));
  EXPECT_TRUE(same(state_of(optimizer, p).momentum_buffer(), p.grad()));
  p.mutable_grad() = at::ones({4});
  optimizer.step();
  EXPECT_TRUE(same(optimizer.latent(p), at::tensor({-0.234375f, -1.734375f, -1.828125f, 0.421875f})));
  EXPECT_TRUE(same(p.detach(), 1.0546875f * at::tensor({-1.0f, -1.0f, -1.0f, 1.0f})));
  EXPECT_TRUE(same(state_of(optimizer, p).momentum_buffer(), at::tensor({1.5f, 1.5f, 3.0f, 0.0f})));
  EXPECT_TRUE(same(state_of(optimizer, p).step(), at::scalar_tensor(2.0f)));
}

// lr 1/2, blend 1/4, Nesterov momentum 1: the first direction is twice the gradient. Ternary: the k largest
// magnitudes are kept for which (sum of them) / sqrt(k) is largest, and the scale is their mean.
//   y              = 1, 1/4, -2, 1/2
//   k = 2, by 3 / 1.41 (2 / 1, 3.5 / 1.73): scale = 1.5, w = 1.5, 0, -1.5, 0
//   3/4 y + 1/4 w  = 1.125, 0.1875, -1.875, 0.375
//   - 1/2 * 2 * (0.5, -0.4375, -0.5, 0.5)
//                  = 0.625, 0.625, -1.375, -0.125
//   k = 3, by 2.625 / 1.73 (2 / 1.41, 2.75 / 2): scale = 0.875
TEST(Bcgd, AStepOfTwoBitsWorkedOutByHand) {
  const auto p = parameter(at::tensor({1.0f, 0.25f, -2.0f, 0.5f}));
  BCGD optimizer({ParamGroup{.params = {p}, .quant_bits = 2}},
                 BCGDOptions(0.5).momentum(1).nesterov(true).blend(0.25));
  EXPECT_TRUE(same(p.detach(), at::tensor({1.5f, 0.0f, -1.5f, 0.0f})));
  p.mutable_grad() = at::tensor({0.5f, -0.4375f, -0.5f, 0.5f});
  optimizer.step();
  EXPECT_TRUE(same(optimizer.latent(p), at::tensor({0.625f, 0.625f, -1.375f, -0.125f})));
  EXPECT_TRUE(same(state_of(optimizer, p).scale(), at::scalar_tensor(0.875f)));
  EXPECT_TRUE(same(p.detach(), at::tensor({0.875f, 0.875f, -0.875f, 0.0f})));
}

// A group's own learning rate and decay; a step size that is clamped: 0.5 - 1 (1 + 0 * 0.5) = -0.5 -> 0.25.
TEST(Bcgd, OptionsOfAGroupWorkedOutByHand) {
  const auto weight = parameter(at::full({2}, 1.0f));
  const auto alpha = parameter(at::scalar_tensor(0.5f));
  const auto bias = parameter(at::full({1}, 2.0f));
  BCGD optimizer({ParamGroup{.name = "quantized", .params = {weight}, .quant_bits = 1},
                  ParamGroup{.params = {alpha}, .min_value = 0.25, .lr = 1.0, .weight_decay = 0.0},
                  ParamGroup{.params = {bias}}},
                 BCGDOptions(0.5).weight_decay(0.5).blend(0));
  for (const auto& p : {weight, alpha, bias}) p.mutable_grad() = at::ones_like(p);
  optimizer.step();
  EXPECT_TRUE(same(weight.detach(), at::full({2}, 0.25f)));  // 1 - 0.5 (1 + 0.5 * 1)
  EXPECT_TRUE(same(alpha.detach(), at::scalar_tensor(0.25f)));
  EXPECT_TRUE(same(bias.detach(), at::full({1}, 1.0f)));  // 2 - 0.5 (1 + 0.5 * 2)
  EXPECT_EQ(options_of(optimizer, 0).name(), "quantized");
  EXPECT_EQ(options_of(optimizer, 1).lr(), 1.0);
  EXPECT_EQ(options_of(optimizer, 2).weight_decay(), 0.5);
}

TEST(Bcgd, AParameterWithoutGradientStays) {
  const auto p = parameter(at::tensor({1.0f, -3.0f}));
  BCGD optimizer({ParamGroup{.params = {p}, .quant_bits = 1}}, BCGDOptions(0.5));
  EXPECT_FALSE(optimizer.step().defined());
  EXPECT_TRUE(same(p.detach(), at::tensor({2.0f, -2.0f})));
}

// ---- against torch::optim::SGD ----

void set_gradients(const std::vector<Tensor>& params, int step) {
  at::manual_seed(step);
  for (size_t i = 0; i < params.size(); ++i) {
    const auto grad = at::randn_like(params[i]);
    params[i].mutable_grad() = (i + step) % 5 == 0 ? Tensor() : grad;
  }
}

std::vector<Tensor> parameters() {
  at::manual_seed(7);
  return {parameter(at::randn({3, 4})), parameter(at::randn({5})), parameter(at::randn({}).to(at::kDouble))};
}

TEST(Bcgd, PlainGroupsTakeTheStepsOfSgdBitForBit) {
  using torch::optim::SGDOptions;
  const std::vector<SGDOptions> cases{SGDOptions(0.1), SGDOptions(0.1).weight_decay(0.01),
                                      SGDOptions(0.1).momentum(0.9),
                                      SGDOptions(0.1).momentum(0.9).dampening(0.3).weight_decay(0.1),
                                      SGDOptions(0.1).momentum(0.8).nesterov(true).weight_decay(0.1)};
  for (const auto& o : cases) {
    const auto ours = parameters();
    const auto theirs = parameters();
    const auto options =
        BCGDOptions(o.lr()).momentum(o.momentum()).dampening(o.dampening()).weight_decay(o.weight_decay());
    BCGD bcgd({ParamGroup{.params = ours}}, BCGDOptions(options).nesterov(o.nesterov()));
    torch::optim::SGD sgd(theirs, o);
    torch::optim::StepLR our_schedule(bcgd, /*step_size=*/3, /*gamma=*/0.7);
    torch::optim::StepLR their_schedule(sgd, 3, 0.7);
    for (int step = 0; step < 20; ++step) {
      set_gradients(ours, step);
      set_gradients(theirs, step);
      bcgd.step();
      sgd.step();
      our_schedule.step();
      their_schedule.step();
      for (size_t i = 0; i < ours.size(); ++i) ASSERT_TRUE(same(ours[i], theirs[i])) << step;
    }
    EXPECT_NEAR(options_of(bcgd, 0).lr(), 0.1 * std::pow(0.7, 6), 1e-12);
  }
}

TEST(Bcgd, EvaluatesAClosureWithGradients) {
  const auto p = parameter(at::full({2}, 3.0f));
  BCGD optimizer({ParamGroup{.params = {p}, .quant_bits = 1}}, BCGDOptions(0.5).blend(0));
  const torch::NoGradGuard no_grad;
  const auto loss = optimizer.step([&] {
    optimizer.zero_grad();
    auto value = p.square().sum();
    value.backward();
    return value;
  });
  EXPECT_EQ(loss.item<float>(), 18);
  EXPECT_TRUE(same(optimizer.latent(p), at::zeros({2})));
}

// ---- making groups ----

TEST(Bcgd, GroupsOfTorchKeepTheirOptions) {
  const auto p = parameter(at::tensor({1.0f, -3.0f, 0.1f}));
  const auto q = parameter(at::full({2}, 5.0f));
  const auto own = BCGDOptions(0.25).quant_bits(2).method("twn").blend(0.5).name("own").momentum(0.5);
  const std::vector<OptimizerParamGroup> groups{{{p}, std::make_unique<BCGDOptions>(own)}, {{q}}};
  BCGD optimizer(groups, BCGDOptions(0.5).weight_decay(0.1));
  EXPECT_EQ(options_of(optimizer, 0).quant_bits(), 2);
  EXPECT_EQ(options_of(optimizer, 0).method(), "twn");
  EXPECT_EQ(options_of(optimizer, 0).lr(), 0.25);
  EXPECT_EQ(options_of(optimizer, 0).blend(), 0.5);
  EXPECT_EQ(options_of(optimizer, 0).momentum(), 0.5);
  EXPECT_EQ(options_of(optimizer, 0).weight_decay(), 0);
  EXPECT_EQ(options_of(optimizer, 0).name(), "own");
  EXPECT_TRUE(same(p.detach(), at::tensor({2.0f, -2.0f, 0.0f})));
  EXPECT_FALSE(options_of(optimizer, 1).quant_bits());
  EXPECT_EQ(options_of(optimizer, 1).weight_decay(), 0.1);
  const auto r = parameter(at::tensor({1.0f, -3.0f}));
  optimizer.add_param_group(
      OptimizerParamGroup({r}, std::make_unique<BCGDOptions>(BCGDOptions(1).quant_bits(1))));
  EXPECT_EQ(options_of(optimizer, 2).lr(), 1);
  EXPECT_TRUE(same(r.detach(), at::tensor({2.0f, -2.0f})));
  static_cast<BCGDOptions&>(optimizer.param_groups()[2].options()).lr(0.5);
  r.mutable_grad() = at::ones({2});
  optimizer.step();
  EXPECT_TRUE(near(optimizer.latent(r), at::tensor({0.5f, -3.5f}), 0, 1e-4));  // but for the blend
}

TEST(Bcgd, WarnsWhereNothingIsQuantized) {
  Warnings warnings;
  BCGD optimizer(std::vector<Tensor>{parameter(at::ones({2}))}, BCGDOptions(0.1));
  ASSERT_EQ(warnings.messages.size(), 1u);
  EXPECT_EQ(warnings.messages[0],
            "BCGD: no group has quant_bits, so nothing is quantized: each step is that of torch::optim::SGD, "
            "and step "
            "sizes of StaircaseReLUs are not clamped to alpha_min. Make groups with "
            "torchqat::optim::param_groups(model, weight_bits).");
}

TEST(Bcgd, NamesWrongOptions) {
  const auto p = parameter(at::ones({2}));
  const auto refused = [&](const BCGDOptions& options) {
    return error_of([&] { BCGD optimizer({ParamGroup{.params = {p}}}, options); });
  };
  EXPECT_EQ(refused(-1), "BCGD: lr must be at least 0, got -1");
  EXPECT_EQ(refused(std::nan("")), "BCGD: lr must be at least 0, got nan");
  EXPECT_EQ(refused(BCGDOptions(1).momentum(-0.5)), "BCGD: momentum must be at least 0, got -0.5");
  EXPECT_EQ(refused(BCGDOptions(1).weight_decay(-2)), "BCGD: weight_decay must be at least 0, got -2");
  for (const double bad : std::vector<double>{INFINITY, -INFINITY, NAN}) {
    EXPECT_EQ(refused(BCGDOptions(1).dampening(bad)), c10::str("BCGD: dampening must be finite, got ", bad));
  }
  EXPECT_EQ(refused(INFINITY), "BCGD: lr must be finite, got inf");
  EXPECT_EQ(refused(BCGDOptions(1).momentum(INFINITY)), "BCGD: momentum must be finite, got inf");
  EXPECT_EQ(refused(BCGDOptions(1).weight_decay(INFINITY)), "BCGD: weight_decay must be finite, got inf");
  EXPECT_EQ(refused(BCGDOptions(1).blend(1.5)), "BCGD: blend must be in 0..1, got 1.5");
  const std::string nesterov = "BCGD: Nesterov momentum requires a momentum and zero dampening";
  EXPECT_EQ(refused(BCGDOptions(1).nesterov(true)), nesterov);
  EXPECT_EQ(refused(BCGDOptions(1).nesterov(true).momentum(0.5).dampening(0.1)), nesterov);
}

TEST(Bcgd, NamesWrongGroupsAndKeepsNothingOfThem) {
  const auto p = parameter(at::tensor({1.0f, -3.0f}));
  BCGD optimizer({ParamGroup{.params = {parameter(at::ones({2}))}, .quant_bits = 1}}, BCGDOptions(0.1));
  const auto add = [&](ParamGroup group, const Tensor& param) {
    group.params = {param};
    optimizer.add_param_group(group);
  };
  const auto refused = [&](const ParamGroup& group, const Tensor& param) {
    return error_of([&] { add(group, param); });
  };
  EXPECT_EQ(refused({.quant_bits = 9}, p), "BCGD: quant_bits must be in 1..8, got 9");
  EXPECT_EQ(refused({.quant_bits = 0}, p), "BCGD: quant_bits must be in 1..8, got 0");
  EXPECT_EQ(refused({.quant_bits = 1, .min_value = 0.1}, p),
            "BCGD: min_value is for groups without quant_bits");
  EXPECT_EQ(refused({.quant_bits = 1}, p * 2),
            "BCGD: parameters must be leaf tensors, got the result of MulBackward1");
  EXPECT_EQ(refused({.quant_bits = 1}, Tensor()),
            "BCGD: parameters must be leaf tensors, got an undefined one");
  EXPECT_EQ(refused({.lr = -1}, p), "BCGD: lr must be at least 0, got -1");
  EXPECT_EQ(refused({.quant_bits = 4, .method = "nearest"}, p),
            "quantize_weight: unknown method 'nearest'; choose one of exact, lloyd, twn");
  EXPECT_EQ(refused({.quant_bits = 4, .method = "twn"}, p),
            "quantize_weight: method 'twn' is ternary, so bits must be 2, got 4");
  EXPECT_EQ(refused({.quant_bits = 4, .channel_dim = 1}, p),
            "quantize_weight: channel_dim must be a dimension of weight, which has shape [2], got 1");
  EXPECT_EQ(error_of<c10::TypeError>([&] { add({.quant_bits = 1}, at::ones({2}, at::kInt)); }),
            "BCGD: parameters of a group with quant_bits must be floating point, got Int");
  EXPECT_EQ(
      error_of<c10::TypeError>([&] {
        optimizer.add_param_group(OptimizerParamGroup({p}, std::make_unique<torch::optim::SGDOptions>(0.1)));
      }),
      "BCGD: the options of a group must be BCGDOptions, got torch::optim::SGDOptions");
  EXPECT_EQ(optimizer.param_groups().size(), 1u);
  EXPECT_EQ(optimizer.state().count(p.unsafeGetTensorImpl()), 0u);
  EXPECT_TRUE(same(p.detach(), at::tensor({1.0f, -3.0f})));
  add({.quant_bits = 1}, p);
  EXPECT_TRUE(same(p.detach(), at::tensor({2.0f, -2.0f})));
}

// What is refused before anything is written, and by the writing itself.
TEST(Bcgd, ARefusedGroupLeavesTheWeightsOfThoseBeforeIt) {
  const auto overlapping = at::zeros({1}).expand({3}).requires_grad_();
  const auto plain = parameter(at::ones({3}));
  const std::vector<ParamGroup> refused{{.params = {plain}, .quant_bits = 9},
                                        {.params = {plain}, .quant_bits = 4, .method = "twn"},
                                        {.params = {plain}, .quant_bits = 1, .channel_dim = 5},
                                        {.params = {at::ones({3}, at::kInt)}, .quant_bits = 1},
                                        {.params = {plain}, .lr = -1},
                                        {.params = {overlapping}, .quant_bits = 1}};
  for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16}) {
    const auto p = parameter(at::tensor({1.0f, -3.0f, 0.3f}).to(dtype));
    const auto before = p.detach().clone();
    const ParamGroup first{.params = {p}, .quant_bits = 2};
    for (const auto& group : refused) {
      EXPECT_NE(error_of<c10::Error>([&] {
                  BCGD({first, group}, BCGDOptions(0.1).momentum(0.9));
                }),
                "no error");
      EXPECT_TRUE(same(p.detach(), before));
      if (group.lr) continue;
      std::vector<OptimizerParamGroup> groups;
      for (const auto& each : {first, group})
        groups.emplace_back(each.params, std::make_unique<BCGDOptions>(BCGDOptions(0.1)
                                                                           .quant_bits(each.quant_bits)
                                                                           .channel_dim(each.channel_dim)
                                                                           .method(each.method)));
      EXPECT_NE(error_of<c10::Error>([&] { BCGD(groups, BCGDOptions(0.1)); }), "no error");
      EXPECT_TRUE(same(p.detach(), before));
    }
  }
}

TEST(Bcgd, AGroupThatCannotBeWrittenLeavesItsWeights) {
  const auto p = parameter(at::tensor({1.0f, -3.0f}));
  BCGD optimizer({ParamGroup{.params = {parameter(at::ones({2}))}, .quant_bits = 1}}, BCGDOptions(0.1));
  const auto overlapping = at::zeros({1}).expand({3}).requires_grad_();
  EXPECT_NE(error_of<c10::Error>([&] {
              optimizer.add_param_group(ParamGroup{.params = {p, overlapping}, .quant_bits = 1});
            }),
            "no error");
  EXPECT_TRUE(same(p.detach(), at::tensor({1.0f, -3.0f})));
  EXPECT_EQ(optimizer.param_groups().size(), 1u);
  EXPECT_EQ(optimizer.state().size(), 1u);
  optimizer.add_param_group(ParamGroup{.params = {p}, .quant_bits = 1});
  EXPECT_TRUE(same(optimizer.latent(p), at::tensor({1.0f, -3.0f})));
}

TEST(Bcgd, SparseGradientsAreRefused) {
  const auto p = parameter(at::eye(3));
  BCGD optimizer({ParamGroup{.params = {p}, .quant_bits = 1}}, BCGDOptions(0.1));
  const auto before = p.detach().clone();
  p.mutable_grad() = at::eye(3).to_sparse();
  EXPECT_EQ(error_of<c10::Error>([&] { optimizer.step(); }),
            "BCGD: gradients in a group with quant_bits must be dense, got a sparse one");
  EXPECT_TRUE(same(p.detach(), before));
}

TEST(Bcgd, AGroupSaysWhatItWantsAndHasTheRestFromTheOptimizer) {
  const auto p = parameter(at::ones({2}));
  const auto q = parameter(at::ones({2}));
  BCGD optimizer({ParamGroup{.params = {p}, .lr = 0.5, .momentum = 0.25, .blend = 0.125, .maximize = true},
                  ParamGroup{.params = {q}, .dampening = 0.75, .weight_decay = 2}},
                 BCGDOptions(0.1).momentum(0.9));
  const auto& first = options_of(optimizer, 0);
  const auto& second = options_of(optimizer, 1);
  EXPECT_EQ(std::tuple(first.lr(), first.momentum(), first.blend(), first.maximize()),
            std::tuple(0.5, 0.25, 0.125, true));
  EXPECT_EQ(std::tuple(second.lr(), second.momentum(), second.dampening(), second.weight_decay()),
            std::tuple(0.1, 0.9, 0.75, 2.0));
  EXPECT_EQ(error_of([&] { BCGD({ParamGroup{.params = {p}}}, BCGDOptions(0.1).quant_bits(1)); }),
            "BCGD: the options of all ParamGroups must say nothing of quantization, got quant_bits=1, "
            "channel_dim=None, method=exact; give it to a group");
}

}  // namespace
