#include "torchqat/calibrate.h"

#include <ATen/ATen.h>
#include <ATen/core/Generator.h>
#include <torch/utils.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "torchqat/nn/staircase_relu.h"
#include "torchqat/ops/step_size.h"

namespace torchqat {
namespace {

// What one StaircaseReLU is given.
struct Observed {
  std::string name;
  nn::StaircaseReLUImpl* module;
  at::Tensor counts;
  int64_t calls = 0;
};

// Sets the step size; returns why it stays, where it does.
std::string set_alpha(Observed& observed) {
  auto& module = *observed.module;
  auto alpha = module.alpha.detach();
  auto steps = best_step_sizes(observed.counts, module.options.bits());
  const auto missing = std::count_if(steps.begin(), steps.end(), [](double s) { return std::isnan(s); });
  for (auto& step : steps) {
    if (!std::isnan(step)) step = std::max(step, module.options.alpha_min());
  }
  const auto found = at::tensor(steps, at::kDouble).to(alpha.options()).view_as(alpha);
  alpha.copy_(at::where(found.isnan(), alpha, found));
  if (!missing) return "";
  if (!observed.calls) return c10::str("\n  ", observed.name, ": never called");
  return c10::str("\n  ", observed.name, ": no positive input",
                  steps.size() > 1 ? c10::str(" in ", missing, " of ", steps.size(), " channels") : "");
}

}  // namespace

struct Calibration::State {
  std::vector<Observed> observed;
  std::vector<std::pair<torch::nn::Module*, bool>> modes;
  at::Device device = at::kCPU;
  std::vector<std::pair<at::Generator, at::Tensor>> random;  // generators and their states
  int64_t batches = 0;
};

Calibration::Calibration(torch::nn::Module& model) : state_(std::make_unique<State>()) {
  auto& state = *state_;
  model.apply([&](const std::string& name, torch::nn::Module& module) {
    state.modes.emplace_back(&module, module.is_training());
    auto* staircase = dynamic_cast<nn::StaircaseReLUImpl*>(&module);
    const bool known = std::any_of(state.observed.begin(), state.observed.end(),
                                   [&](const auto& o) { return o.module == staircase; });
    TORCH_CHECK(!staircase || !staircase->observer, "calibrate: '", name.empty() ? "StaircaseReLU" : name,
                "' is being calibrated already: one Calibration of a model at a time");
    if (staircase && !known)
      state.observed.push_back({name.empty() ? "StaircaseReLU" : name, staircase,
                                empty_magnitude_counts(staircase->alpha.numel())});
  });
  TORCH_CHECK_VALUE(!state.observed.empty(), "calibrate: the model has no StaircaseReLU");
  state.device = model.parameters().front().device();
  std::vector<at::Device> devices{at::kCPU};
  if (state.device != at::kCPU) devices.push_back(state.device);
  for (const auto& device : devices) {
    const auto generator = at::globalContext().defaultGenerator(device);
    state.random.emplace_back(generator, generator.get_state());
  }
  model.eval();
  for (auto& observed : state.observed) {
    observed.module->observer = [&observed](const at::Tensor& x) {
      TORCH_CHECK_VALUE(x.isfinite().all().item<bool>(), "calibrate: the input of '", observed.name,
                        "' has NaN or infinity in it");
      ++observed.calls;
      count_magnitudes(x, observed.counts);
    };
  }
}

Calibration::~Calibration() {
  for (auto& observed : state_->observed) observed.module->observer = nullptr;
  // Children were listed after their parents, whose train() sets theirs too.
  for (auto& [module, training] : state_->modes) module->train(training);
  for (auto& [generator, state] : state_->random) generator.set_state(state);
}

void Calibration::run(const std::function<void()>& forward) {
  const torch::NoGradGuard no_grad;
  forward();
  ++state_->batches;
}

at::Device Calibration::device() const { return state_->device; }

void Calibration::set_alphas() {
  const torch::NoGradGuard no_grad;
  TORCH_CHECK_VALUE(state_->batches > 0, "calibrate: batches is empty");
  std::string kept;
  std::string shared;
  for (auto& observed : state_->observed) {
    kept += set_alpha(observed);
    if (observed.calls > state_->batches)
      shared += c10::str("\n  ", observed.name, ": ", double(observed.calls) / double(state_->batches),
                         " calls a batch");
  }
  if (!kept.empty()) TORCH_WARN("calibrate: these StaircaseReLUs keep their step size:", kept);
  if (!shared.empty())
    TORCH_WARN("calibrate: these StaircaseReLUs have one step size for several calls:", shared);
}

}  // namespace torchqat
