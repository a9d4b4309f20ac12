// The C++ interface on each device that there is: what it computes on a GPU against the CPU, whose results
// the other files test. Networks are float64, so that nothing but the order of sums may differ.
#include <torch/cuda.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torchqat/torchqat.h>

#include "torch_checks.h"

namespace {

using at::Tensor;
using torch::nn::Conv2dOptions;
using torch::nn::Sequential;
using torchqat::calibrate;
using torchqat::optim::BCGD;
using torchqat::optim::BCGDOptions;
using torchqat::optim::BCGDParamState;
using torchqat::optim::param_groups;
using torchqat::optim::ParamGroup;
using namespace torchqat::nn;

std::vector<at::DeviceType> devices() {
  std::vector<at::DeviceType> types{at::kCPU};
  if (torch::cuda::is_available() && !torchqat::build_info().cuda.empty()) types.push_back(at::kCUDA);
  return types;
}

struct Devices : ::testing::TestWithParam<at::DeviceType> {
  // With its index, as tensors have it.
  at::Device device() const { return at::empty({0}, GetParam()).device(); }
  Tensor moved(const Tensor& t) const {
    return t.detach().to(device(), /*non_blocking=*/false, /*copy=*/true);
  }
};
INSTANTIATE_TEST_SUITE_P(, Devices, ::testing::ValuesIn(devices()), [](const auto& type) {
  return c10::DeviceTypeName(type.param, /*lower_case=*/true);
});

Sequential network() {
  at::manual_seed(0);
  Sequential net(QuantConv2d(Conv2dOptions(1, 4, 3).padding(1)), QuantBatchNorm2d(4),
                 StaircaseReLU(StaircaseReLUOptions(2).channels(4)), QuantMaxPool2d(2), torch::nn::Flatten(),
                 QuantLinear(64, 8), StaircaseReLU(2), QuantLinear(8, 3));
  net->to(at::kDouble);
  return net;
}

Tensor images(int64_t count) { return at::randn({count, 1, 8, 8}, at::kDouble); }

std::vector<Tensor> values_of(const torch::nn::Module& model) {
  std::vector<Tensor> values;
  for (const auto& p : model.parameters()) values.push_back(p.detach().cpu());
  for (const auto& b : model.buffers()) values.push_back(b.cpu());
  return values;
}

void expect_near(const std::vector<Tensor>& actual, const std::vector<Tensor>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) EXPECT_TRUE(near(actual[i], expected[i], 1e-9, 1e-9)) << i;
}

TEST_P(Devices, Activations) {
  const auto x = at::randn({5, 3, 7}), alpha = at::tensor({0.3f, 0.5f, 0.7f}), grad = at::randn({5, 3, 7});
  EXPECT_TRUE(same(torchqat::staircase_codes(moved(x), moved(alpha), 2).cpu(),
                   torchqat::staircase_codes(x, alpha, 2)));
  for (const auto& ste : torchqat::ste_names()) {
    const auto run = [&](const Tensor& input, const Tensor& step, const Tensor& upstream) {
      const auto in = input.clone().requires_grad_(), a = step.clone().requires_grad_();
      const auto y = torchqat::staircase_relu(in, a, 2, ste);
      y.backward(upstream);
      return std::vector{y.detach().cpu(), in.grad().cpu(), a.grad().cpu()};
    };
    const auto ours = run(moved(x), moved(alpha), moved(grad));
    const auto theirs = run(x, alpha, grad);
    EXPECT_TRUE(same(ours[0], theirs[0])) << ste;
    for (size_t i = 1; i < 3; ++i) EXPECT_TRUE(near(ours[i], theirs[i])) << ste;
  }
}

TEST_P(Devices, WeightsAndCodes) {
  const auto weight = at::randn({6, 5, 3});
  for (const int64_t bits : {1, 2, 4}) {
    for (const auto channel_dim : {std::optional<int64_t>(), std::optional<int64_t>(0)}) {
      const auto [w, scale] = torchqat::quantize_weight(weight, bits, "exact", channel_dim);
      const auto [v, other] = torchqat::quantize_weight(moved(weight), bits, "exact", channel_dim);
      EXPECT_EQ(v.device(), device());
      EXPECT_TRUE(near(other.cpu(), scale));
      EXPECT_TRUE(near(v.cpu(), w));
      const auto codes = torchqat::weight_codes(v, other, bits, channel_dim);
      EXPECT_TRUE(same(codes.cpu(), torchqat::weight_codes(w, scale, bits, channel_dim)));
    }
    const auto codes = at::randint(1 << bits, {7, 3}).to(at::kByte);
    const auto packed = torchqat::pack_codes(moved(codes), bits);
    EXPECT_TRUE(same(packed.cpu(), torchqat::pack_codes(codes, bits)));
    EXPECT_TRUE(same(torchqat::unpack_codes(packed, bits, {7, 3}).cpu(), codes));
  }
}

TEST_P(Devices, NetworksMoveAndAreCloned) {
  auto net = network();
  const auto x = images(3);
  net->forward(x);  // running statistics
  net->eval();
  const auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(net->clone(device()));
  auto there = network();
  there->to(device());
  for (const auto& model : {copy, there.ptr()}) {
    for (const auto& p : model->parameters()) EXPECT_EQ(p.device(), device());
    for (const auto& b : model->buffers()) EXPECT_EQ(b.device(), device());
  }
  expect_near(values_of(*copy), values_of(*net));
  EXPECT_TRUE(near(copy->forward(moved(x)).cpu(), net->forward(x), 1e-9, 1e-9));
  QuantLinear linear(3, 2);
  const auto alone = std::dynamic_pointer_cast<QuantLinearImpl>(linear->clone(device()));
  EXPECT_EQ(alone->weight.device(), device());
  EXPECT_TRUE(same(alone->weight.detach().cpu(), linear->weight.detach()));
  EXPECT_FALSE(alone->weight.is_alias_of(linear->weight));
}

TEST_P(Devices, CalibrationMovesTheBatches) {
  auto here = network(), there = network();
  there->to(device());
  const std::vector<Tensor> batches{images(4), images(6)};
  calibrate(here, batches);
  calibrate(there, batches);  // which are on the CPU
  expect_near(values_of(*there), values_of(*here));
}

TEST_P(Devices, TrainingTakesTheStepsOfTheCpu) {
  auto here = network(), there = network();
  there->to(device());
  const auto options = BCGDOptions(0.01).momentum(0.9).weight_decay(1e-4);
  BCGD ours(param_groups(*there, 2), options), theirs(param_groups(*here, 2), options);
  for (int step = 0; step < 5; ++step) {
    const auto x = images(10), wanted = at::randn({10, 3}, at::kDouble);
    ours.zero_grad();
    theirs.zero_grad();
    at::mse_loss(there->forward(moved(x)), moved(wanted)).backward();
    at::mse_loss(here->forward(x), wanted).backward();
    ours.step();
    theirs.step();
  }
  expect_near(values_of(*there), values_of(*here));
  {
    const auto a = ours.latents(), b = theirs.latents();
    expect_near(values_of(*there), values_of(*here));
  }
  const auto file = torchqat::checkpoint_of(*there, &ours);
  torchqat::restore_checkpoint(file, *here, &theirs);
  EXPECT_TRUE(same(theirs.latent(here->parameters()[0]).cpu(), ours.latent(there->parameters()[0]).cpu()));
  EXPECT_TRUE(theirs.latent(here->parameters()[0]).is_cpu());
}

TEST_P(Devices, OneGroupMayBeOnSeveral) {
  const auto values = at::tensor({1.0f, -0.5f, 2.0f, -0.5f});
  const auto p = values.clone().requires_grad_(), q = moved(values).requires_grad_();
  BCGD optimizer({ParamGroup{.params = {p, q}, .quant_bits = 1}}, BCGDOptions(0.5).momentum(0.5).blend(0.25));
  for (int step = 0; step < 2; ++step) {
    p.mutable_grad() = at::tensor({1.0f, 1.0f, 4.0f, -2.0f});
    q.mutable_grad() = moved(p.grad());
    optimizer.step();
  }
  EXPECT_EQ(optimizer.latent(q).device(), device());
  EXPECT_TRUE(same(optimizer.latent(q).cpu(), optimizer.latent(p)));  // exact in binary
  EXPECT_TRUE(same(q.detach().cpu(), p.detach()));
}

TEST_P(Devices, ProbesAreTheSameNumbers) {
  for (const auto* distribution : {"gaussian", "rademacher"}) {
    const auto options = FastFeatureAffinityLossOptions().distribution(distribution);
    FastFeatureAffinityLoss here(options), there(options);
    for (int draw = 0; draw < 3; ++draw) {
      const auto probes = there->draw(9, device());
      EXPECT_EQ(probes.device(), device());
      EXPECT_TRUE(same(probes.cpu(), here->draw(9, at::kCPU)));
    }
  }
  auto generator = at::globalContext().defaultGenerator(device()).clone();
  FastFeatureAffinityLoss own(FastFeatureAffinityLossOptions().generator(generator));
  const auto again = std::dynamic_pointer_cast<FastFeatureAffinityLossImpl>(own->clone());
  EXPECT_TRUE(same(own->draw(9, device()).cpu(), again->draw(9, device()).cpu()));
}

TEST_P(Devices, FeatureAffinity) {
  const auto student = at::randn({2, 3, 4, 5}), teacher = at::randn({2, 6, 4, 5});
  for (const auto* norm : {"l1", "fro"}) {
    FeatureAffinityLoss exact(FeatureAffinityLossOptions().norm(norm));
    FastFeatureAffinityLoss here(FastFeatureAffinityLossOptions().norm(norm));
    FastFeatureAffinityLoss there(FastFeatureAffinityLossOptions().norm(norm));
    const auto run = [](auto& loss, const Tensor& features, const Tensor& wanted) {
      const auto in = features.clone().requires_grad_();
      const auto value = loss(in, wanted);
      value.backward();
      return std::pair(value.detach().cpu(), in.grad().cpu());
    };
    for (const auto& [ours, theirs] :
         {std::pair(run(exact, moved(student), moved(teacher)), run(exact, student, teacher)),
          std::pair(run(there, moved(student), moved(teacher)), run(here, student, teacher))}) {
      EXPECT_TRUE(near(ours.first, theirs.first)) << norm;
      EXPECT_TRUE(near(ours.second, theirs.second)) << norm;
    }
  }
}

}  // namespace
