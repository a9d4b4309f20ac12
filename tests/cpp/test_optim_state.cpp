// What BCGD keeps: latents, their saving and loading, changes from outside.
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/serialize.h>
#include <torch/optim/sgd.h>
#include <torch/serialize.h>
#include <torchqat/torchqat.h>

#include <sstream>

#include "torch_checks.h"

namespace {

using at::Tensor;
using torch::nn::Linear;
using torch::nn::Sequential;
using torchqat::nn::StaircaseReLU;
using torchqat::optim::BCGD;
using torchqat::optim::BCGDOptions;
using torchqat::optim::BCGDParamState;
using torchqat::optim::param_groups;
using torchqat::optim::ParamGroup;
using torchqat::optim::ParamGroupsOptions;

// A network and its optimizer, of which everything can be compared.
struct Training {
  explicit Training(uint64_t seed = 0, int64_t bits = 2, int64_t hidden = 6, double momentum = 0.9,
                    const ParamGroupsOptions& groups = {})
      : model(make(seed, hidden)),
        optimizer(param_groups(*model, bits, groups),
                  BCGDOptions(0.05).momentum(momentum).weight_decay(1e-3)) {}

  static Sequential make(uint64_t seed, int64_t hidden) {
    at::manual_seed(seed);
    return Sequential(Linear(8, hidden), StaircaseReLU(2), Linear(hidden, 3));
  }

  void step(int64_t number) {
    auto generator = at::detail::createCPUGenerator(number);
    const auto x = at::randn({10, 8}, generator);
    optimizer.zero_grad();
    (model->forward(x) - x.slice(1, 0, 3)).square().mean().backward();
    optimizer.step();
  }

  // Parameters, and the optimizer's tensors for each.
  std::vector<Tensor> tensors() const {
    std::vector<Tensor> all;
    for (const auto& p : model->parameters()) {
      all.push_back(p.detach().clone());
      const auto found = optimizer.state().find(p.unsafeGetTensorImpl());
      if (found == optimizer.state().end()) continue;
      const auto& state = static_cast<const BCGDParamState&>(*found->second);
      for (const auto& t : {state.latent(), state.scale(), state.momentum_buffer(), state.step()})
        all.push_back(t.defined() ? t.clone() : t);
    }
    return all;
  }

  Tensor weight() const { return model->parameters()[0]; }

  Sequential model;
  BCGD optimizer;
};

void expect_same(const std::vector<Tensor>& actual, const std::vector<Tensor>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) EXPECT_TRUE(same(actual[i], expected[i])) << i;
}

template <typename Saved>
std::string saved(const Saved& object) {
  std::stringstream file;
  torch::save(object, file);
  return file.str();
}

template <typename Loaded>
void load(Loaded& object, const std::string& bytes) {
  std::stringstream file(bytes);
  torch::load(object, file);
}

// ---- saving and loading ----

TEST(BcgdState, TrainingResumesBitForBit) {
  for (const double momentum : {0.0, 0.9}) {
    for (const auto& groups : {ParamGroupsOptions(), ParamGroupsOptions().channel_dim(0).method("lloyd")}) {
      Training first(0, 3, 6, momentum, groups);
      for (int step = 0; step < 5; ++step) first.step(step);
      const auto model = saved(first.model);
      const auto optimizer = saved(first.optimizer);
      const auto then = first.tensors();
      for (int step = 5; step < 10; ++step) first.step(step);

      Training second(1, 3, 6, momentum, groups);
      second.step(99);
      load(second.model, model);
      Warnings warnings;
      load(second.optimizer, optimizer);
      expect_same(second.tensors(), then);
      for (int step = 5; step < 10; ++step) second.step(step);
      expect_same(second.tensors(), first.tensors());
      EXPECT_TRUE(warnings.messages.empty());
    }
  }
}

TEST(BcgdState, AfterLoadingParametersHoldTheProjectionsOfTheLatents) {
  Training first;
  first.step(0);
  Training second(1);
  load(second.optimizer, saved(first.optimizer));  // without the model
  EXPECT_TRUE(same(second.weight(), first.weight()));
  EXPECT_TRUE(same(second.optimizer.latent(second.weight()), first.optimizer.latent(first.weight())));
  EXPECT_FALSE(second.optimizer.latent(second.weight()).is_alias_of(first.optimizer.latent(first.weight())));
}

TEST(BcgdState, OptionsAreLoadedToo) {
  Training first;
  first.optimizer.param_groups()[0].options().set_lr(0.125);
  Training second;
  load(second.optimizer, saved(first.optimizer));
  EXPECT_EQ(second.optimizer.param_groups()[0].options().get_lr(), 0.125);
  EXPECT_EQ(second.optimizer.param_groups()[1].options().get_lr(), 0.05);
  const auto& options = static_cast<const BCGDOptions&>(second.optimizer.param_groups()[1].options());
  EXPECT_EQ(options.min_value(), 1e-3);
  EXPECT_EQ(options.name(), "alphas");
}

// Loading it throws and changes nothing; what is the message?
std::string refused(Training& training, const std::string& bytes) {
  training.step(0);
  training.optimizer.param_groups()[0].options().set_lr(0.75);
  const auto before = training.tensors();
  const auto error = error_of([&] { load(training.optimizer, bytes); });
  expect_same(training.tensors(), before);
  EXPECT_EQ(training.optimizer.param_groups()[0].options().get_lr(), 0.75);
  return error;
}

TEST(BcgdState, AnotherStateIsRefusedAndChangesNothing) {
  Training ours, one_bit(0, 1), other_size(0, 2, 5),
      per_channel(0, 2, 6, 0.9, ParamGroupsOptions().channel_dim(0)),
      twn(0, 2, 6, 0.9, ParamGroupsOptions().method("twn"));
  for (auto* training : {&one_bit, &other_size, &per_channel, &twn}) training->step(1);
  const std::string quantized =
      "BCGD: group 0 of the archive must be quantized as quant_bits=2, channel_dim=None, "
      "method=exact, got quant_bits=";
  EXPECT_EQ(refused(ours, saved(one_bit.optimizer)), quantized + "1, channel_dim=None, method=exact");
  EXPECT_EQ(refused(ours, saved(per_channel.optimizer)), quantized + "2, channel_dim=0, method=exact");
  EXPECT_EQ(refused(ours, saved(twn.optimizer)), quantized + "2, channel_dim=None, method=twn");
  EXPECT_EQ(refused(ours, saved(other_size.optimizer)),
            "BCGD: latent of parameter 0 in the state must have shape [6, 8], got [5, 8]: another model's?");
  const std::string groups = "BCGD: load: the archive must be of a BCGD with the same groups: ";
  BCGD fewer({ParamGroup{.params = {at::ones({2}).requires_grad_()}, .quant_bits = 2}}, BCGDOptions(0.1));
  EXPECT_EQ(refused(ours, saved(fewer)).substr(0, groups.size()), groups);
  torch::optim::SGD sgd(ours.model->parameters(), torch::optim::SGDOptions(0.1));
  EXPECT_EQ(refused(ours, saved(sgd)).substr(0, groups.size()), groups);
}

TEST(BcgdState, StatesAreCheckedBeforeTheyAreTakenOver) {
  const auto p = at::tensor({1.0f, -3.0f}).requires_grad_();
  BCGD optimizer({ParamGroup{.params = {p}, .quant_bits = 1}}, BCGDOptions(0.1));
  const auto refused = [&](const std::vector<BCGDParamState>& states) {
    const auto error = error_of([&] { optimizer.restore(states); });
    EXPECT_EQ(error, error_of([&] { optimizer.check_states(states); }));
    EXPECT_TRUE(same(optimizer.latent(p), at::tensor({1.0f, -3.0f})));
    return error;
  };
  const auto two = at::ones({2});
  const auto one = at::ones({});
  EXPECT_EQ(refused({}), "BCGD: there must be 1 states, got 0");
  EXPECT_EQ(refused({BCGDParamState().latent(two)}),
            "BCGD: the state has no scale for parameter 0, which is quantized");
  EXPECT_EQ(refused({BCGDParamState().scale(one)}),
            "BCGD: the state has no latent for parameter 0, which is quantized");
  EXPECT_EQ(refused({BCGDParamState().latent(two).scale(one).step(one)}),
            "BCGD: the state has only one of momentum_buffer and step for parameter 0");
  EXPECT_EQ(refused({BCGDParamState().latent(two).scale(two)}),
            "BCGD: scale of parameter 0 in the state must have shape [], got [2]: another model's?");
  EXPECT_EQ(
      refused({BCGDParamState().latent(two).scale(one).momentum_buffer(one).step(one)}),
      "BCGD: momentum_buffer of parameter 0 in the state must have shape [2], got []: another model's?");
  optimizer.restore({BCGDParamState().latent(two * 2).scale(one * 2)});
  EXPECT_TRUE(same(p.detach(), at::full({2}, 2.0f)));
}

// ---- latents ----

TEST(BcgdState, LatentsAreInTheParametersWhileTheScopeLasts) {
  Training training;
  training.step(0);
  const auto w = training.weight().detach().clone();
  const auto before = training.tensors();
  {
    const auto latents = training.optimizer.latents();
    EXPECT_TRUE(same(training.weight().detach(), training.optimizer.latent(training.weight())));
    EXPECT_FALSE(at::equal(training.weight(), w));
    const auto refused = [](const char* what) {
      return c10::str("BCGD: ", what,
                      " must not be called while latents() lives: the parameters hold latents");
    };
    EXPECT_EQ(error_of<c10::Error>([&] { training.step(1); }), refused("step"));
    EXPECT_EQ(error_of<c10::Error>([&] { training.optimizer.refresh(); }), refused("refresh"));
    EXPECT_EQ(error_of<c10::Error>([&] { auto again = training.optimizer.latents(); }), refused("latents"));
    EXPECT_EQ(error_of<c10::Error>([&] { load(training.optimizer, saved(training.optimizer)); }),
              refused("load"));
    EXPECT_EQ(error_of<c10::Error>([&] { training.optimizer.restore({}); }), refused("restore"));
    EXPECT_EQ(error_of<c10::Error>([&] { torchqat::checkpoint_of(*training.model, &training.optimizer); }),
              refused("save_checkpoint"));
  }
  expect_same(training.tensors(), before);
  try {
    const auto latents = training.optimizer.latents();
    const torch::NoGradGuard no_grad;
    training.weight().fill_(9);  // lost
    throw std::runtime_error("from inside");
  } catch (const std::runtime_error&) {
  }
  expect_same(training.tensors(), before);
  Warnings warnings;
  training.step(1);
  EXPECT_TRUE(warnings.messages.empty());
}

TEST(BcgdState, LatentsOfHalfPrecisionAreFloat) {
  const auto p = at::tensor({1.0f, -3.0f, 2.0f}).to(at::kBFloat16).requires_grad_();
  BCGD optimizer({ParamGroup{.params = {p}, .quant_bits = 1}}, BCGDOptions(1e-3).momentum(0.9).blend(0));
  p.mutable_grad() = at::ones({3}, at::kBFloat16);
  optimizer.step();
  EXPECT_TRUE(near(optimizer.latent(p), at::tensor({0.999f, -3.001f, 1.999f}), 1e-6, 0));
  EXPECT_EQ(optimizer.latent(p).scalar_type(), at::kFloat);
  EXPECT_EQ(p.scalar_type(), at::kBFloat16);
}

TEST(BcgdState, LatentIsOfQuantizedParametersAlone) {
  Training training;
  training.step(0);
  const std::string error = "BCGD: latent is for parameters of groups with quant_bits, got another";
  EXPECT_EQ(error_of([&] { training.optimizer.latent(training.model->parameters()[1]); }), error);
  EXPECT_EQ(error_of([&] { training.optimizer.latent(at::ones({2})); }), error);
}

// ---- changes from outside ----

TEST(BcgdState, ChangedParametersGetANewLatentAndAWarningOnce) {
  Training training(0, 1, 6, 0);
  training.step(0);
  const auto fill = [&](double value) {
    const torch::NoGradGuard no_grad;
    training.weight().fill_(value);
  };
  Warnings warnings;
  fill(0.5);
  training.step(1);
  ASSERT_EQ(warnings.messages.size(), 1u);
  EXPECT_EQ(
      warnings.messages[0],
      "BCGD: 1 parameter(s) changed outside the optimizer, the first of shape [6, 8]: their float latents "
      "are "
      "dropped and start again from the new values. Load a checkpoint into both model and optimizer to go on "
      "with its latents. (Warned of once.)");
  EXPECT_TRUE(near(training.optimizer.latent(training.weight()), at::full({6, 8}, 0.5), 0, 0.1));
  fill(-0.5);
  training.step(2);
  EXPECT_EQ(warnings.messages.size(), 1u);
  EXPECT_TRUE(near(training.optimizer.latent(training.weight()), at::full({6, 8}, -0.5), 0, 0.1));
}

TEST(BcgdState, TheSameValuesWrittenAgainAreNoChange) {
  Training training;
  training.step(0);
  const auto latent = training.optimizer.latent(training.weight()).clone();
  {
    const torch::NoGradGuard no_grad;
    training.weight().copy_(training.weight().clone());
  }
  Warnings warnings;
  { const auto latents = training.optimizer.latents(); }
  EXPECT_TRUE(same(training.optimizer.latent(training.weight()), latent));
  EXPECT_TRUE(warnings.messages.empty());
}

TEST(BcgdState, RefreshFindsWritesThroughDataPointers) {
  Training training(0, 1, 6, 0);
  training.step(0);
  const auto kept = training.optimizer.latent(training.model->parameters()[3]).clone();
  training.weight().data_ptr<float>()[0] = 7;
  Warnings warnings;
  training.optimizer.refresh();
  EXPECT_TRUE(warnings.messages.empty());
  EXPECT_EQ(training.optimizer.latent(training.weight())[0][0].item<float>(), 7);
  EXPECT_TRUE(same(training.optimizer.latent(training.model->parameters()[3]), kept));
}

TEST(BcgdState, AStartFromQuantizedValuesIsWarnedOf) {
  Training training(0, 1);
  training.step(0);
  BCGD second(param_groups(*training.model, 1), BCGDOptions(0.1));
  Warnings warnings;
  second.step();
  second.step();
  ASSERT_EQ(warnings.messages.size(), 1u);
  EXPECT_EQ(
      warnings.messages[0],
      "BCGD: 2 parameter(s), the first of shape [6, 8], held quantized values when this optimizer was "
      "made: their float latents start from those. If an earlier BCGD quantized them, its latents are "
      "not used. Go on with that optimizer, load its state into this one, or copy its latent(p) into each "
      "parameter p before this one is made.");
  BCGD third(param_groups(*training.model, 1), BCGDOptions(0.1).momentum(0.9));
  load(third, saved(training.optimizer));
  third.step();
  EXPECT_EQ(warnings.messages.size(), 1u);
}

TEST(BcgdState, FollowsAModelThatIsCast) {
  Training training(0, 1, 6, 0);
  training.step(0);
  const auto latent = training.optimizer.latent(training.weight()).clone();
  training.model->to(at::kBFloat16);
  Warnings warnings;
  { const auto latents = training.optimizer.latents(); }
  EXPECT_TRUE(warnings.messages.empty());
  EXPECT_TRUE(same(training.optimizer.latent(training.weight()), latent));
  training.model->to(at::kDouble);
}

// What is not quantized keeps the dtype that torch::optim::SGD keeps.
TEST(BcgdState, PlainGroupsOfHalfPrecisionResumeBitForBit) {
  const auto step = [](const Tensor& p, BCGD& optimizer, int64_t number) {
    auto generator = at::detail::createCPUGenerator(number);
    p.mutable_grad() = at::randn({1000}, generator).to(at::kBFloat16);
    optimizer.step();
  };
  const auto make = [](const Tensor& p) {
    return std::make_unique<BCGD>(std::vector{ParamGroup{.params = {p}}}, BCGDOptions(0.1).momentum(0.9));
  };
  const auto p = at::ones({1000}, at::kBFloat16).requires_grad_();
  const auto first = make(p);
  for (int64_t number = 0; number < 3; ++number) step(p, *first, number);
  const auto q = p.detach().clone().requires_grad_();
  const auto second = make(q);
  load(*second, saved(*first));
  for (int64_t number = 3; number < 6; ++number) {
    step(p, *first, number);
    step(q, *second, number);
  }
  EXPECT_TRUE(same(p, q));
}

TEST(BcgdState, TakesTheStateOfTorchsSgdWhereNothingIsQuantized) {
  const auto p = at::ones({3}).requires_grad_();
  torch::optim::SGD sgd({p}, torch::optim::SGDOptions(0.1).momentum(0.9));
  p.mutable_grad() = at::ones({3});
  sgd.step();
  std::stringstream archive;
  torch::save(sgd, archive);
  const auto q = p.detach().clone().requires_grad_();
  BCGD optimizer(std::vector{ParamGroup{.params = {q}}}, BCGDOptions(0.1).momentum(0.9));
  torch::load(optimizer, archive);
  q.mutable_grad() = at::ones({3});
  sgd.step();
  optimizer.step();
  EXPECT_TRUE(same(p, q));
}

TEST(BcgdState, OptionsThatAnArchiveLacksStayTheGroups) {
  const auto p = at::ones({3}).requires_grad_();
  torch::optim::SGD sgd({p}, torch::optim::SGDOptions(0.5).momentum(0.9));
  const auto q = at::ones({3}).requires_grad_();
  const auto options = BCGDOptions(0.1).min_value(0.25).name("alphas").maximize(true).blend(0.5);
  const std::vector<torch::optim::OptimizerParamGroup> groups{{{q}, std::make_unique<BCGDOptions>(options)}};
  BCGD optimizer(groups, BCGDOptions(0.2));
  load(optimizer, saved(sgd));
  const auto& loaded = static_cast<const BCGDOptions&>(optimizer.param_groups()[0].options());
  EXPECT_EQ(loaded.lr(), 0.5);
  EXPECT_EQ(loaded.momentum(), 0.9);
  EXPECT_EQ(loaded.min_value(), 0.25);
  EXPECT_EQ(loaded.name(), "alphas");
  EXPECT_TRUE(loaded.maximize());
  EXPECT_EQ(loaded.blend(), 0.5);
  q.mutable_grad() = -at::ones({3});
  optimizer.step();
  EXPECT_TRUE(same(q.detach(), at::full({3}, 0.5f)));
  optimizer.step();
  EXPECT_TRUE(same(q.detach(), at::full({3}, 0.25f)));  // clamped, where it would be 0.05 - 0.5
}

// ---- damaged archives ----

// An optimizer as torch::optim::serialize writes it, by its parts.
struct Archive {
  std::string state_key = "7", param_key = "7", version = "1.5.0";
  BCGDOptions options = BCGDOptions(0.1).quant_bits(1).momentum(0.9);

  std::string bytes() const {
    torch::serialize::OutputArchive archive;
    const auto& unit = archive.compilation_unit();
    torch::serialize::OutputArchive states(unit), state(unit), groups(unit), group(unit), own(unit);
    BCGDParamState()
        .latent(at::tensor({1.0f, -2.0f}))
        .scale(at::scalar_tensor(1.5f))
        .momentum_buffer(at::zeros({2}))
        .step(at::ones({}))
        .serialize(state);
    states.write(state_key, state);
    group.write("params/size", at::tensor(int64_t{1}));
    group.write("params/0", c10::IValue(param_key));
    options.serialize(own);
    group.write("options", own);
    groups.write("param_groups/size", at::tensor(int64_t{1}));
    groups.write("param_groups/0", group);
    archive.write("pytorch_version", c10::IValue(version));
    archive.write("state", states);
    archive.write("param_groups", groups);
    std::stringstream file;
    archive.save_to(file);
    return file.str();
  }
};

TEST(BcgdState, DamagedArchivesAreRefusedAndChangeNothing) {
  const auto p = at::tensor({1.0f, -3.0f}).requires_grad_();
  BCGD optimizer({ParamGroup{.params = {p}, .quant_bits = 1}}, BCGDOptions(0.75));
  const auto refused = [&](const Archive& archive) {
    const auto error = error_of([&] { load(optimizer, archive.bytes()); });
    EXPECT_EQ(optimizer.param_groups()[0].options().get_lr(), 0.75);
    EXPECT_TRUE(same(optimizer.latent(p), at::tensor({1.0f, -3.0f})));
    return error;
  };
  const std::string other = "BCGD: load: the archive must be of a BCGD with the same groups: ";
  for (const auto& key : {"no number", "99999999999999999999999999", ""}) {
    EXPECT_EQ(refused({.param_key = key}).substr(0, other.size()), other) << key;
    if (*key) {
      EXPECT_EQ(refused({.state_key = key}).substr(0, other.size()), other) << key;
    }
  }
  EXPECT_EQ(refused({.version = "2"}).substr(0, other.size()), other);
  const std::string group = "BCGD: group 0 of the archive: ";
  const auto options = BCGDOptions(0.1).quant_bits(1);
  EXPECT_EQ(refused({.options = BCGDOptions(options).lr(-1)}), group + "lr must be at least 0, got -1");
  EXPECT_EQ(refused({.options = BCGDOptions(options).lr(std::nan(""))}),
            group + "lr must be at least 0, got nan");
  EXPECT_EQ(refused({.options = BCGDOptions(options).blend(2)}), group + "blend must be in 0..1, got 2");
  EXPECT_EQ(refused({.options = BCGDOptions(options).nesterov(true)}),
            group + "Nesterov momentum requires a momentum and zero dampening");
  load(optimizer, Archive().bytes());
  EXPECT_TRUE(same(p.detach(), at::tensor({1.5f, -1.5f})));
}

}  // namespace
