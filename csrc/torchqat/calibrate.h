#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>

#include <concepts>
#include <functional>
#include <memory>

#include "torchqat/macros.h"

namespace torchqat {

// Sets the step size of every StaircaseReLU of a model to the one of least mean squared error for its inputs,
// over all batches, in one pass in which they act as plain ReLUs: see torchqat.calibrate in Python, whose
// step sizes these are, bit by bit. Training modes and random generators are afterwards what they were.
// `model` is a module whose forward takes a tensor, its holder or a pointer to either; a batch is that
// tensor, or has it as `data` (the batches of LibTorch's data loaders). They are moved to the device of the
// model's first parameter.
template <typename Model, typename Batches>
void calibrate(Model&& model, Batches&& batches);

// What it is made of, for models that are called in other ways: make one, call run() with each batch, and at
// last set_alphas(). While it lives the model, which must outlive it, is in eval mode and its staircases are
// plain ReLUs; one that ends before set_alphas() leaves the model as it was. One at a
// time: a second one throws, and leaves the first and the model as they are.
class TORCHQAT_API Calibration {
 public:
  explicit Calibration(torch::nn::Module& model);
  Calibration(const Calibration&) = delete;
  Calibration& operator=(const Calibration&) = delete;
  ~Calibration();
  void run(const std::function<void()>& forward);
  void set_alphas();
  at::Device device() const;  // of the model's first parameter

 private:
  struct State;
  std::unique_ptr<State> state_;
};

namespace detail {

template <typename Model>
auto& module_of(Model& model) {
  if constexpr (std::derived_from<Model, torch::nn::Module>)
    return model;
  else if constexpr (requires { model.ptr(); })  // of a holder, also where that is const
    return *model.ptr();
  else
    return module_of(*model);
}

}  // namespace detail

template <typename Model, typename Batches>
void calibrate(Model&& model, Batches&& batches) {
  auto& module = detail::module_of(model);
  Calibration calibration(module);
  for (const auto& batch : batches) {
    calibration.run([&] {
      if constexpr (requires { batch.data.to(calibration.device()); })
        module.forward(batch.data.to(calibration.device()));
      else
        module.forward(batch.to(calibration.device()));
    });
  }
  calibration.set_alphas();
}

}  // namespace torchqat
