// Checkpoints of C++: training goes on bit for bit, and what does not fit is refused with nothing changed.
// tests/test_checkpoint.py exchanges them with Python.
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/linear.h>
#include <torchqat/torchqat.h>

#include "torch_checks.h"

namespace {

using at::Tensor;
using torchqat::checkpoint_of;
using torchqat::load_checkpoint;
using torchqat::restore_checkpoint;
using torchqat::save_checkpoint;
using torchqat::TensorFile;
using torchqat::nn::FastFeatureAffinityLoss;
using torchqat::nn::StaircaseReLU;
using torchqat::optim::BCGD;
using torchqat::optim::BCGDOptions;
using torchqat::optim::BCGDParamState;
using torchqat::optim::param_groups;
using torchqat::optim::ParamGroup;
using torchqat::optim::ParamGroupsOptions;

struct StudentImpl : torch::nn::Module {
  explicit StudentImpl(int64_t act_bits = 2, int64_t hidden = 6)
      : first(8, hidden), norm(hidden), act(act_bits), last(hidden, 3) {
    register_module("first", first);
    register_module("norm", norm);
    register_module("act", act);
    register_module("last", last);
    register_module("affinity", affinity);
  }
  Tensor forward(const Tensor& x) { return last(act(norm(first(x)))); }

  torch::nn::Linear first;
  torch::nn::BatchNorm1d norm;
  StaircaseReLU act;
  torchqat::nn::QuantLinear last;
  FastFeatureAffinityLoss affinity;
};
TORCH_MODULE(Student);

struct Training {
  explicit Training(uint64_t seed = 0, int64_t bits = 2, int64_t act_bits = 2, int64_t hidden = 6,
                    const ParamGroupsOptions& groups = {})
      : model((at::manual_seed(seed), Student(act_bits, hidden))),
        optimizer(param_groups(*model, bits, groups), BCGDOptions(0.05).momentum(0.9)) {}

  void step(int64_t number) {
    auto generator = at::detail::createCPUGenerator(number);
    const auto x = at::randn({10, 8}, generator);
    const auto out = model(x);
    const auto maps = out.view({1, 3, 10});
    optimizer.zero_grad();
    (out.square().mean() + model->affinity(maps, x.view({1, 8, 10}))).backward();
    optimizer.step();
  }

  // All that a checkpoint has.
  TensorFile state() const { return checkpoint_of(*model, &optimizer); }

  Student model;
  BCGD optimizer;
};

void expect_same(const TensorFile& actual, const TensorFile& expected) {
  EXPECT_EQ(actual.metadata, expected.metadata);
  ASSERT_EQ(actual.tensors.size(), expected.tensors.size());
  for (const auto& [name, tensor] : expected.tensors)
    EXPECT_TRUE(same(actual.tensors.at(name), tensor)) << name;
}

TEST(Checkpoint, TrainingResumesBitForBit) {
  for (const auto& groups : {ParamGroupsOptions(), ParamGroupsOptions().channel_dim(0).method("lloyd")}) {
    const TemporaryFolder folder;
    const std::string path = folder.path / "model.safetensors";
    Training first(0, 3, 2, 6, groups);
    for (int step = 0; step < 5; ++step) first.step(step);
    save_checkpoint(path, *first.model, &first.optimizer);
    const auto then = first.state();
    expect_same(torchqat::load_safetensors(path), then);
    for (int step = 5; step < 10; ++step) first.step(step);

    Training second(1, 3, 2, 6, groups);
    second.step(99);
    Warnings warnings;
    load_checkpoint(path, *second.model, &second.optimizer);
    expect_same(second.state(), then);
    for (int step = 5; step < 10; ++step) second.step(step);
    expect_same(second.state(), first.state());
    EXPECT_TRUE(warnings.messages.empty());
  }
}

TEST(Checkpoint, IsOfItsMoment) {
  Training training;
  training.step(0);
  const auto file = checkpoint_of(*training.model, &training.optimizer);
  auto copies = file;
  for (auto& [name, tensor] : copies.tensors) tensor = tensor.clone();
  training.step(1);
  expect_same(file, copies);
  restore_checkpoint(file, *training.model, &training.optimizer);
  expect_same(training.state(), file);
}

TEST(Checkpoint, HasTheNamesOfTheModel) {
  Training training;
  training.step(0);
  const auto file = training.state();
  for (const auto* name : {"first.weight", "norm.running_var", "norm.num_batches_tracked", "act.alpha",
                           "affinity._extra_state", "optimizer.first.weight.latent",
                           "optimizer.first.weight.scale", "optimizer.last.weight.momentum_buffer",
                           "optimizer.last.weight.step", "optimizer.act.alpha.momentum_buffer"}) {
    EXPECT_EQ(file.tensors.count(name), 1u) << name;
  }
  EXPECT_EQ(file.tensors.count("optimizer.act.alpha.latent"), 0u);
  EXPECT_EQ(file.metadata.at("format"), "torchqat checkpoint 1");
  EXPECT_EQ(file.metadata.at("optimizer"), "BCGD");
  EXPECT_EQ(file.metadata.at("torchqat"), torchqat::build_info().torchqat);
  EXPECT_EQ(file.metadata.at("staircase_relu.act"), "bits=2, ste=clipped_relu, alpha_grad=three_valued");
  EXPECT_EQ(file.metadata.at("quantized.first.weight"), "quant_bits=2, channel_dim=None, method=exact");
  EXPECT_EQ(checkpoint_of(*training.model).metadata.count("optimizer"), 0u);
}

TEST(Checkpoint, TheModelAlone) {
  Training first;
  first.step(0);
  Training second(1);
  const auto latent = second.optimizer.latent(second.model->first->weight).clone();
  restore_checkpoint(first.state(), *second.model);
  EXPECT_TRUE(same(second.model->first->weight, first.model->first->weight));
  EXPECT_TRUE(same(second.model->norm->running_mean, first.model->norm->running_mean));
  EXPECT_TRUE(same(second.optimizer.latent(second.model->first->weight), latent));
  // Also from a file of any other program, in another floating dtype.
  auto tensors = checkpoint_of(*first.model).tensors;
  tensors["first.weight"] = at::full({6, 8}, 0.5, at::kDouble);
  restore_checkpoint({tensors, {{"format", "pt"}}}, *second.model);
  EXPECT_TRUE(same(second.model->first->weight.detach(), at::full({6, 8}, 0.5f)));
}

// LibTorch's to(dtype) converts BatchNorm's counter of batches, and Python's does not.
TEST(Checkpoint, ACounterIsConverted) {
  for (const auto dtype : {at::kDouble, at::kBFloat16}) {
    torch::nn::BatchNorm1d integer(2), floating(2);
    floating->to(dtype);
    ASSERT_EQ(floating->num_batches_tracked.scalar_type(), dtype);
    floating->num_batches_tracked.fill_(7);
    restore_checkpoint(checkpoint_of(*floating), *integer);
    EXPECT_TRUE(same(integer->num_batches_tracked, at::scalar_tensor(7, at::kLong)));
    integer->num_batches_tracked.fill_(5);
    restore_checkpoint(checkpoint_of(*integer), *floating);
    EXPECT_TRUE(same(floating->num_batches_tracked, at::scalar_tensor(5, dtype)));
  }
}

TEST(Checkpoint, GoesOnWithTheRandomNumbersOfTheLoss) {
  Training first;
  first.step(0);
  const auto file = first.state();
  Training second(1);
  restore_checkpoint(file, *second.model);
  EXPECT_TRUE(same(second.model->affinity->draw(4, at::kCPU), first.model->affinity->draw(4, at::kCPU)));
  FastFeatureAffinityLoss alone;
  restore_checkpoint({{{"_extra_state", file.tensors.at("affinity._extra_state")}}, {}}, *alone);
  EXPECT_TRUE(same(alone->generator.get_state(), file.tensors.at("affinity._extra_state")));
}

// ---- refusals ----

// The message, without its beginning, where a changed state of `from` is loaded; nothing changes in
// `training`.
std::string refused(Training& training, const Training& from, const std::function<void(TensorFile&)>& change,
                    bool with_optimizer = true) {
  auto file = from.state();
  change(file);
  const auto before = training.state();
  const auto error = error_of([&] {
    restore_checkpoint(file, *training.model, with_optimizer ? &training.optimizer : nullptr, "W");
  });
  expect_same(training.state(), before);
  return error;
}

void as_it_is(TensorFile&) {}

TEST(Checkpoint, RefusesOtherModels) {
  Training ours, trained(1);
  for (int step = 0; step < 2; ++step) ours.step(step);
  trained.step(3);
  const auto with = [&](const char* name, const Tensor& value) {
    return refused(ours, trained, [&](TensorFile& file) { file.tensors[name] = value; });
  };
  EXPECT_EQ(refused(ours, trained, [](TensorFile& file) { file.tensors.erase("first.bias"); }),
            "W: must have the names of the model, lacks 'first.bias'");
  EXPECT_EQ(with("second.bias", at::ones({2})),
            "W: must have the names of the model, also has 'second.bias'");
  EXPECT_EQ(refused(ours, trained,
                    [](TensorFile& file) {
                      for (char c = 'a'; c < 'h'; ++c) file.tensors[std::string(1, c)] = at::ones({});
                    }),
            "W: must have the names of the model, also has 'a', 'b', 'c', 'd', 'e' and 2 more");
  EXPECT_EQ(with("first.bias", at::ones({5})), "W: 'first.bias' must have shape [6], got [5]");
  EXPECT_EQ(with("first.bias", at::ones({6}, at::kInt)), "W: 'first.bias' must be Float, got Int");
  const std::string whole = "W: 'norm.num_batches_tracked' must be a whole number for Long, got ";
  EXPECT_EQ(with("norm.num_batches_tracked", at::scalar_tensor(2.5)), whole + "2.5");
  EXPECT_EQ(with("norm.num_batches_tracked", at::scalar_tensor(std::nan(""))), whole + "nan");
  EXPECT_EQ(with("norm.num_batches_tracked", at::scalar_tensor(1e30, at::kDouble)), whole + "1e+30");
  EXPECT_EQ(with("norm.num_batches_tracked", at::ones({}, at::kBool)),
            "W: 'norm.num_batches_tracked' must be Long, got Bool");
  EXPECT_EQ(with("affinity._extra_state", at::ones({5}, at::kByte)).substr(0, 68),
            "W: 'affinity._extra_state' must be the state of a generator on cpu: ");
  EXPECT_EQ(
      refused(ours, trained, [](TensorFile& file) { file.metadata["format"] = "torchqat checkpoint 2"; }),
      "W: the format must be 'torchqat checkpoint 1', got 'torchqat checkpoint 2'");
  EXPECT_EQ(refused(ours, Training(0, 2, 3), as_it_is, false),
            "W: StaircaseReLU 'act' must be the same in the file and in the model: the file has bits=3, "
            "ste=clipped_relu, alpha_grad=three_valued; the model has bits=2, ste=clipped_relu, "
            "alpha_grad=three_valued");
  EXPECT_EQ(refused(ours, trained, [](TensorFile& file) { file.metadata.erase("staircase_relu.act"); }),
            "W: StaircaseReLU 'act' must be the same in the file and in the model: the file has none; the "
            "model has "
            "bits=2, ste=clipped_relu, alpha_grad=three_valued");
}

TEST(Checkpoint, RefusesOtherOptimizers) {
  Training ours, trained(1);
  ours.step(0);
  trained.step(3);
  const auto change = [&](const std::function<void(TensorFile&)>& f) { return refused(ours, trained, f); };
  const auto with = [&](const char* name, const Tensor& value) {
    return change([&](TensorFile& file) { file.tensors[name] = value; });
  };
  EXPECT_EQ(change([&](TensorFile& file) { file = checkpoint_of(*trained.model); }),
            "W: must have the state of an optimizer; to load the model alone give none");
  EXPECT_EQ(change([](TensorFile& file) { file.metadata["optimizer"] = "SGD"; }),
            "W: the optimizer must be 'BCGD', got 'SGD'");
  EXPECT_EQ(
      refused(ours, Training(0, 1), as_it_is),
      "W: quantized parameter 'first.weight' must be the same in the file and in the optimizer: the file has "
      "quant_bits=1, channel_dim=None, method=exact; the optimizer has quant_bits=2, channel_dim=None, "
      "method=exact");
  EXPECT_EQ(
      refused(ours, Training(0, 2, 2, 6, ParamGroupsOptions().quantize_last(false)), as_it_is),
      "W: quantized parameter 'last.weight' must be the same in the file and in the optimizer: the file has "
      "none; the optimizer has quant_bits=2, channel_dim=None, method=exact");
  const std::string keys =
      "W: the optimizer's state must be floating-point latent, scale, momentum_buffer, step, got ";
  EXPECT_EQ(with("optimizer.first.weight.exp_avg", at::ones({})),
            keys + "'optimizer.first.weight.exp_avg' of Float");
  EXPECT_EQ(with("optimizer.latent", at::ones({})), keys + "'optimizer.latent' of Float");
  EXPECT_EQ(with("optimizer.first.weight.step", at::ones({}, at::kLong)),
            keys + "'optimizer.first.weight.step' of Long");
  EXPECT_EQ(with("optimizer.middle.weight.latent", at::ones({})),
            "W: has a state for 'middle.weight', which is not in the optimizer");
  EXPECT_EQ(change([](TensorFile& file) { file.tensors.erase("optimizer.first.weight.scale"); }),
            "W: the state has no scale for parameter 'first.weight', which is quantized");
  EXPECT_EQ(
      with("optimizer.last.weight.latent", at::ones({3})),
      "W: latent of parameter 'last.weight' in the state must have shape [3, 6], got [3]: another model's?");
}

TEST(Checkpoint, RefusesParametersOutsideTheModel) {
  Training training;
  const auto outside = at::ones({2, 3}).requires_grad_();
  training.optimizer.add_param_group(ParamGroup{.name = "more", .params = {outside}});
  const std::string rest =
      ": parameter 0 of the optimizer's group 3 (more), of shape [2, 3], is not in the model: give a module "
      "that "
      "holds both";
  EXPECT_EQ(error_of([&] { checkpoint_of(*training.model, &training.optimizer); }), "save_checkpoint" + rest);
  const auto file = Training().state();
  EXPECT_EQ(error_of([&] { restore_checkpoint(file, *training.model, &training.optimizer); }),
            "restore_checkpoint" + rest);
  torch::nn::Module model;
  model.register_module("optimizer", torch::nn::Linear(1, 1));
  EXPECT_EQ(error_of([&] { checkpoint_of(model); }),
            "save_checkpoint: no name in the model must begin with 'optimizer.', got 'optimizer.bias'");
}

TEST(Checkpoint, NamesTheFile) {
  const TemporaryFolder folder;
  const std::string path = folder.path / "model.safetensors";
  Training training;
  EXPECT_EQ(error_of<c10::Error>([&] { load_checkpoint(path, *training.model); }),
            "load_safetensors: " + path + ": No such file or directory");
  save_checkpoint(path, *training.model);
  EXPECT_EQ(error_of([&] { load_checkpoint(path, *training.model, &training.optimizer); }),
            "load_checkpoint: " + path +
                ": must have the state of an optimizer; to load the model alone give none");
  const auto latents = training.optimizer.latents();
  EXPECT_EQ(error_of<c10::Error>([&] { load_checkpoint(path, *training.model, &training.optimizer); }),
            "BCGD: load_checkpoint must not be called while latents() lives: the parameters hold latents");
}

// Python's named_modules() gives it the first of its names, and its state has its tensors under both.
TEST(Checkpoint, AStaircaseUnderTwoNamesGoesByTheFirst) {
  torch::nn::Module model;
  const torchqat::nn::StaircaseReLU shared(2);
  model.register_module("a", shared.ptr());
  model.register_module("b", shared.ptr());
  const auto file = checkpoint_of(model);
  EXPECT_EQ(file.metadata.count("staircase_relu.a"), 1u);
  EXPECT_EQ(file.metadata.count("staircase_relu.b"), 0u);
  EXPECT_EQ(file.tensors.count("a.alpha") + file.tensors.count("b.alpha"), 2u);
  restore_checkpoint(file, model);
}

TEST(Checkpoint, WhatCannotBeWrittenUndoesTheRest) {
  torch::nn::Module model;
  const auto a = model.register_buffer("a", at::zeros({2}));
  model.register_buffer("b", at::zeros({1}).expand({2}));  // one element in two places
  torchqat::TensorFile file{{{"a", at::ones({2})}, {"b", at::ones({2})}}, {}};
  EXPECT_NE(error_of<c10::Error>([&] { restore_checkpoint(file, model); }), "no error");
  EXPECT_TRUE(same(a, at::zeros({2})));
}

}  // namespace
