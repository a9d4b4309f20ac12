#pragma once

#include <ATen/ATen.h>
#include <torch/nn/modules/container/sequential.h>
#include <torchqat/torchqat.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "mnist.h"
#include "options.h"

// SIGINT or SIGTERM came, and training has stopped between two steps.
struct Stopped {
  int signal;
};

// A network that is trained for some epochs.
struct Stage {
  std::string name;
  torch::nn::Sequential net;
  torchqat::optim::BCGD& optimizer;
  int64_t epochs;
  std::function<at::Tensor(const at::Tensor& images, const at::Tensor& labels)> loss;
};

// The stages of a run, one after the other, with a checkpoint before and after each epoch; with --resume a
// run goes on from it bit for bit.
class Training {
 public:
  // Takes the folder --out for itself, and reads its checkpoint where the run is to be resumed. Checkpoints
  // hold the state of `networks`, to which the training adds what it needs itself, and of the optimizer of
  // their stage.
  Training(const Options& options, const Mnist& data, torch::nn::Module& networks);

  // Whether the checkpoint to go on from was written in a later stage; whether there is one that waits for
  // its stage.
  bool has_passed(const std::string& stage) const;
  bool is_to_resume() const { return saved_.has_value(); }

  void train(Stage stage);

  double accuracy(torch::nn::Sequential& net) const { return accuracy_of(scores(net)); }
  double seconds() const { return seconds_; }  // of training, in all runs

 private:
  void restore(const Stage& stage);
  double train_epoch(Stage& stage, int64_t epoch);
  void end_epoch(Stage& stage, std::optional<double> loss);
  at::Tensor scores(torch::nn::Sequential& net) const;
  double accuracy_of(const at::Tensor& scores) const;

  const Options& options_;
  const Mnist& data_;
  torch::nn::Module& networks_;
  std::string checkpoint_;
  std::shared_ptr<void> lock_;
  at::Generator generator_;
  // In checkpoints: the state of the generator, and how many epochs of a stage are done.
  at::Tensor random_;
  at::Tensor epoch_;
  double seconds_ = 0;
  std::optional<torchqat::TensorFile> saved_;
};
